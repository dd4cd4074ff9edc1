"""The entropy of hidden states: known answers, and the statistic against the states themselves."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.model import Model
from kvtool.statistics.query_entropy import nats
from tests.statistics.observed import text
from tests.tolerance import close


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize("directions", [1, 2, 32])
def test_directions_taken_alike(directions: int, width: int) -> None:
    """ln r, whether there are more rows than channels or fewer."""
    axes = torch.eye(width)[:directions]
    close(nats(torch.cat([axes, -axes])), torch.tensor(math.log(directions)), torch.float32)


def test_against_singular_values(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    expected = []
    for layer in layers:
        x = layer.after.double() - layer.after.double().mean(0)
        values = torch.linalg.svdvals(x / x.norm(dim=1, keepdim=True)).square()
        values = values / values.sum()
        expected.append(float(-(values * values.clamp_min(1e-300).log())[:32].sum()))
    close(trace["state-entropy"]["entropy"], torch.tensor(expected), torch.float32)
    assert trace["state-entropy"]["sequences"].tolist() == [1]
