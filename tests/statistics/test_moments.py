"""Moments of queries and keys after RoPE, against those that eager attention is given."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.models import random_ids
from tests.statistics.naive import written_down
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_moments(name: str) -> None:
    trace, _ = text(name)
    seen = trace["moments"]
    for layer, states in enumerate(written_down(models.shared(name), random_ids(1, TOKENS, seed=20)[0])):
        for side, x in (("q", states.q.double()), ("k", states.k.double())):
            close(seen[f"{side}_sum"][layer] / TOKENS, x.mean(1), torch.float32)
            close(seen[f"{side}_square"][layer] / TOKENS, x.mT @ x / TOKENS, torch.float32)
    assert float(seen["tokens"]) == TOKENS
