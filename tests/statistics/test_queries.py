"""Moments of queries before RoPE, against the projections' own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.statistics.queries import FIRST
from tests import models
from tests.models import random_ids
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close


def projected(name: str) -> list[torch.Tensor]:
    """q [H,T,D] of each layer before RoPE, as the last module before it puts them out."""
    model, found, hooks = models.shared(name), [], []
    g = model.geometry

    def note(module: Any, args: Any, out: torch.Tensor) -> None:
        if out.shape[-1] == 3 * g.query_heads * g.head_dim:  # GPT-NeoX: q, k, v of a head side by side
            out = out.reshape(1, -1, g.query_heads, 3 * g.head_dim)[..., : g.head_dim]
        if out.dim() == 4 and out.shape[1] == g.query_heads:
            out = out.transpose(1, 2)
        found.append(out.reshape(-1, g.query_heads, g.head_dim).transpose(0, 1))

    for attention in model.attention_modules:
        names = [name for name in ("q_norm", "q_proj", "query_key_value") if hasattr(attention, name)]
        hooks.append(getattr(attention, names[0]).register_forward_hook(note))
    with torch.no_grad():
        model.network(input_ids=random_ids(1, TOKENS, seed=20))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_queries(name: str) -> None:
    trace, _ = text(name)
    seen = trace["queries"]
    count = TOKENS - FIRST
    for layer, q in enumerate(projected(name)):
        x = q[:, FIRST:].double()
        close(seen["sum"][layer] / count, x.mean(1), torch.float32)
        close(seen["square"][layer] / count, x.mT @ x / count, torch.float32)
    assert float(seen["tokens"]) == count
