"""The entropy of queries: known answers of card A17, and the statistic against the queries themselves."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.model import Model
from kvtool.statistics.query_entropy import entropy, rising
from tests.statistics.observed import text
from tests.tolerance import close


@pytest.mark.parametrize(("directions", "expected"), [(2, 1 / 7), (8, 3 / 7), (32, 5 / 7), (64, 3 / 7), (128, 0.25)])
def test_directions_taken_alike(directions: int, expected: float) -> None:
    """ln r / ln 128 up to 32; then the cut leaves 32 of r eigenvalues of 1/r."""
    axes = torch.eye(128)[:directions]
    close(entropy(torch.cat([axes, -axes])), torch.tensor(expected), torch.float32)


def test_one_direction_has_none() -> None:
    line = torch.randn(1, 128)
    close(entropy(torch.cat([line, -line] * 8)), torch.tensor(0.0), torch.float32)
    assert float(entropy(torch.ones(20, 16))) == 0
    assert float(entropy(torch.zeros(1, 16))) == 0


def test_neither_scale_nor_offset_matters() -> None:
    q = torch.randn(50, 16)
    close(entropy(7 * q + 3), entropy(q), torch.float32)


def test_against_singular_values(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, kv_heads = trace["query-entropy"], any_model.geometry.kv_heads
    for index, layer in enumerate(layers):
        expected = []
        for q in layer.q.double():
            x = q - q.mean(0)
            values = torch.linalg.svdvals(x / x.norm(dim=1, keepdim=True)).square()
            values = values / values.sum()
            expected.append(float(-(values * values.clamp_min(1e-300).log())[:32].sum() / math.log(q.shape[1])))
        close(seen["entropy"][index], torch.tensor(expected), torch.float32)
        mean = torch.tensor(expected).unflatten(0, (kv_heads, -1)).mean(1)
        places = torch.arange(kv_heads).double()
        assert bool((seen["places"][index].sum(1) == 1).all())
        close(mean[(seen["places"][index] @ places).argsort()], mean.sort().values, torch.float32)


def test_of_equal_heads_the_first_is_higher() -> None:
    assert rising(torch.tensor([1.0, 5.0, 3.0])).tolist() == [0, 2, 1]
    assert rising(torch.tensor([2.0, 1.0, 2.0])).tolist() == [1, 2, 0]
