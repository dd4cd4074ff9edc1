"""The stream-K deal: equal shares, every tile once; and attention over ragged heads, whoever computes which tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.attend import cpu
from kvtool_kernels.attend import reference as define
from kvtool_kernels.schedule import FIRST, HEAD, LAST, SPLIT, SPLITS, WORKER, stream_k
from tests.kernels.test_attend import agree

TILES = ((3, 0, 5, 1), (64, 64, 64), (1,), (17, 2, 900), (0, 0), (7,) * 48)
ENTRIES = ((500,), (5, 1300, 64), (1, 4000, 10, 3000), (900, 900))


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 48, 1000])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_every_tile_once_in_equal_shares(tiles: Sequence[int], workers: int) -> None:
    deal = stream_k(tiles, workers)
    covered = [(row[HEAD], tile) for row in deal for tile in range(row[FIRST], row[LAST])]
    assert covered == [(head, tile) for head, count in enumerate(tiles) for tile in range(count)]
    shares = np.bincount(deal[:, WORKER], deal[:, LAST] - deal[:, FIRST], minlength=workers)
    assert shares.max() - shares.min() <= 1
    assert shares.max() == -(-sum(tiles) // workers)
    assert (np.diff(deal[:, WORKER]) >= 0).all()  # a worker's pieces follow one another
    for head in range(len(tiles)):
        pieces = deal[deal[:, HEAD] == head]
        assert pieces[:, SPLIT].tolist() == list(range(len(pieces)))
        assert (pieces[:, SPLITS] == len(pieces)).all()


def drawn(
    entries: Sequence[int], *, batch: int = 2, kv_heads: int = 2, group: int = 3, tokens: int = 1, width: int = 64
):
    """q and the lanes' k and v, views into larger buffers, as caches hold them."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(batch, len(entries) * kv_heads * group, tokens, width, generator=draw)
    sides = [torch.full((2, batch, kv_heads, count + 9, width), float("nan")).narrow(3, 0, count) for count in entries]
    for side in sides:
        side.copy_(torch.randn(side.shape, generator=draw))
    return q, [side[0] for side in sides], [side[1] for side in sides]


def by_heads(q: torch.Tensor, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], **options):
    """Each KV head by the definition."""
    group, at, found = q.shape[1] // sum(x.shape[1] for x in k), 0, []
    for keys, values in zip(k, v, strict=True):
        for head in range(keys.shape[1]):
            part = q[:, at : at + group]
            found.append(define.attend(part, keys[:, head : head + 1], values[:, head : head + 1], **options))
            at += group
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entries", ENTRIES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ragged_heads_are_each_head_alone(entries: Sequence[int], threads: int, softcap: float | None) -> None:
    """Any number of workers gives the dense result."""
    q, k, v = drawn(entries)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agree(cpu.ragged(q, k, v, scale=0.125, softcap=softcap), by_heads(q, k, v, scale=0.125, softcap=softcap))
    finally:
        torch.set_num_threads(before)


SHAPES = (dict(group=1), dict(group=5, batch=1), dict(tokens=3), dict(width=40), dict(group=20))


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_shapes_that_loops_cut_up_or_leave_to_others(options: dict[str, int]) -> None:
    q, k, v = drawn((5, 1300, 64), **options)
    agree(ops.attend_ragged(q, k, v, scale=0.2), by_heads(q, k, v, scale=0.2))
    agree(define.ragged(q, k, v, scale=0.2), by_heads(q, k, v, scale=0.2))


def test_a_head_without_entries_is_neutral() -> None:
    q, k, v = drawn((900, 0, 70))
    out, lse = ops.attend_ragged(q, k, v, scale=0.2)
    agree((out, lse), by_heads(q, k, v, scale=0.2))
    assert bool((lse[:, 6:12] == float("-inf")).all())
