"""Closing up gaps in place is taking what stays."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.closing import FEW, close_up, closes
from tests.tolerance import same


@pytest.mark.parametrize("gone", [1, 2, 5, FEW])
@pytest.mark.parametrize("held", [20, 63])
def test_what_stays_is_at_the_front_in_order(held: int, gone: int) -> None:
    draw = torch.Generator().manual_seed(held + gone)
    buffers = tuple(torch.randn(2, 3, held, width, generator=draw) for width in (8, 1))
    kept = [torch.randperm(held, generator=draw)[gone:].sort().values for _ in range(6)]
    index = torch.stack(kept).reshape(2, 3, held - gone)
    expected = [x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in buffers]
    assert closes(buffers, index, held)
    close_up(buffers, index, held)
    for buffer, wanted in zip(buffers, expected, strict=True):
        same(buffer[:, :, : held - gone], wanted)


def test_much_room_is_given_back_instead() -> None:
    index = torch.arange(20).expand(1, 1, -1)
    assert not closes((torch.zeros(1, 1, 20 + FEW + 1, 8),), index, 21)
    assert not closes((torch.zeros(1, 1, 22, 8).mT.contiguous().mT,), index, 21)
    assert not closes((torch.zeros(1, 1, 22, 8, requires_grad=True),), index, 21)
