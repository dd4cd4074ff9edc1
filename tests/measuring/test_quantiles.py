"""Running tails give the quantiles of everything, whatever the order and the pieces."""

from __future__ import annotations

import pytest
import torch

from kvtool.measuring.quantiles import Tails
from tests.tolerance import same

X = torch.randn(2, 200, 5, generator=torch.Generator().manual_seed(0))


def tails(x: torch.Tensor, outside: float, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = Tails(x.shape[1], outside)
    for piece in x.split(pieces, 1):
        made.see(piece)
    return made.range()


@pytest.mark.parametrize("pieces", [1, 7, 200])
@pytest.mark.parametrize(("outside", "beyond"), [(0.0, 0), (0.01, 1), (0.1, 10), (1.0, 100)])
def test_as_many_lie_beyond_as_may(outside: float, beyond: int, pieces: int) -> None:
    half, middle = tails(X, outside, pieces)
    sorted_ = X.sort(1).values
    high = sorted_[:, min(199, 199 - beyond)]
    low = sorted_[:, beyond]
    same(half, (high - low) / 2)
    same(middle, (high + low) / 2)
