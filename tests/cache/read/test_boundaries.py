"""Where units of a prompt begin: labels by the definition, a planted boundary, suppression."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.boundaries import _base as boundaries
from kvtool.cache.read.boundaries import labels
from kvtool.cache.read.prefills._base import Job
from kvtool.rotary import NONE
from kvtool.slots import Prefill
from tests.cache.read.prefilling import D, G, K, N, draw, weights


def job(q: torch.Tensor, k: torch.Tensor, window: int) -> Job:
    spec = Prefill(torch.ones(1), window=window)
    return Job(spec, q, k, Step(0, D**-0.5), NONE, 0, lambda low, first, near: torch.zeros(1, 1))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_labels_are_windows_of_the_later_rows(window: int) -> None:
    q, k = 2 * draw(1, K * G, N, D), draw(1, K, N, D, seed=1)
    made, mean = labels.values(job(q, k, window))[0], weights(q[0], k[0]).mean(0)
    for b in range(window, N - window):
        past, future = (float(mean[b + window :, s].sum()) for s in (slice(b - window, b), slice(b, b + window)))
        assert float(made[b]) == pytest.approx((max(past, future) + 1e-6) / (min(past, future) + 1e-6))
    assert not bool(torch.isfinite(made[:window]).any())


def test_a_planted_boundary() -> None:
    """All rows after entry 20 look at entries from 20 on, and at nothing before: that place is the first boundary."""
    k = torch.zeros(1, 1, N, D, dtype=torch.float64)
    k[..., :20, 0], k[..., 20:, 0] = -20.0, 20.0
    q = torch.zeros(1, 1, N, D, dtype=torch.float64)
    q[..., 0] = 3.0
    made = labels.values(job(q, k, 4))
    assert boundaries.chosen(made, 1.1, 8, 1)[0].nonzero().flatten().tolist() == [20]


def test_suppression_is_greedy() -> None:
    values = draw(3, 200, seed=5)
    for apart, most in ((0, 500), (3, 500), (8, 12)):
        made = boundaries.chosen(values, 0.2, apart, most)
        for row in range(3):
            found: list[int] = []
            for place in values[row].argsort(descending=True).tolist():
                if values[row, place] > 0.2 and all(abs(place - other) > apart for other in found):
                    found.append(place)
            assert sorted(found[:most]) == made[row].nonzero().flatten().tolist()
