"""Entries as they are: attention over them, what enters, leaves and is held."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segments import GROWTH, Dense
from kvtool_kernels.attend.reference import attend
from tests.cache.segments import G, draw
from tests.tolerance import close, same


def dense(entries: int = 100) -> tuple[Dense, torch.Tensor, torch.Tensor]:
    """Entries, with NaN in the room to grow."""
    held, k, v = Dense(), draw(2, 2, entries, 8), draw(2, 2, entries, 6, seed=1)
    for low in range(0, entries, 37):
        held.append(k[:, :, low : low + 37], v[:, :, low : low + 37])
    for buffer in held.buffers():
        buffer[:, :, entries:] = float("nan")
    return held, k, v


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("entries", [5, 63, 100, 128])
def test_dense_attention(entries: int, causal: bool, tokens: int) -> None:
    held, k, v = dense(entries)
    q, step = draw(2, 2 * G, tokens, 8, seed=2), Step(0, 0.3, softcap=4.0)
    expected = attend(q, k, v, causal=causal, **step.options)
    for actual, wanted in zip(held.attend(q, step, causal=causal), expected, strict=True):
        close(actual, wanted)


def test_dense_memory_grows_in_steps() -> None:
    held = Dense()
    assert held.read_bytes() == held.key_bytes() == 0
    for count, room in ((63, 1), (1, 1), (1, 2), (2 * GROWTH, 4)):
        held.append(draw(2, 3, count, 8), draw(2, 3, count, 6))
        assert [buffer.nbytes for buffer in held.buffers()] == [2 * 3 * room * GROWTH * n * 4 for n in (8, 6)]
        assert held.key_bytes() == 2 * 3 * held.length * 8 * 4
        assert held.read_bytes() == 2 * 3 * held.length * 14 * 4


@pytest.mark.parametrize("count", [1, 36, 64, 99, 100])
def test_the_oldest_leave(count: int) -> None:
    held, k, v = dense()
    same(torch.cat(held.pop(count), 3), torch.cat([k, v], 3)[:, :, :count])
    assert held.length == 100 - count
    assert sum(b.nbytes for b in held.buffers()) == -(-held.length // GROWTH) * GROWTH * 2 * 2 * 14 * 4
    held.append(k[:, :, :2], v[:, :, :2])
    same(held.keys(), torch.cat([k[:, :, count:], k[:, :, :2]], 2))


def test_what_is_taken_stays() -> None:
    held, k, v = dense()
    index = torch.stack([torch.randperm(100)[:7].sort().values for _ in range(4)]).reshape(2, 2, 7)
    held.take(index)
    k, v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    for actual, wanted in zip(held.recall(), (k, v), strict=True):
        same(actual, wanted)
    assert sum(b.nbytes for b in held.buffers()) == 2 * 2 * 7 * 14 * 4
    held.append(k[:, :, :1], v[:, :, :1])
    same(held.keys(), torch.cat([k, k[:, :, :1]], 2))


def test_counts_stay_with_their_entries() -> None:
    """An entry that stands for n weighs as n copies; those that come later stand for themselves."""
    held, k, v = dense()
    counts = torch.randint(1, 4, (2, 2, 100), generator=torch.Generator().manual_seed(0)).float()
    held.become(k, v, counts, count=True)
    held.pop(30)
    held.append(k[:, :, :5], v[:, :, :5])
    same(held.counts(), torch.cat([counts[:, :, 30:], torch.ones(2, 2, 5)], 2))
    q, step = draw(2, 2 * G, 5, 8, seed=2), Step(0, 0.3)
    bias = held.counts().log()[:, :, None].repeat_interleave(G, 1)
    for causal in (False, True):
        expected = attend(q, *held.recall(), bias=bias, causal=causal, **step.options)
        for actual, wanted in zip(held.attend(q, step, causal=causal), expected, strict=True):
            close(actual, wanted)


def test_dense_units_and_rows() -> None:
    held, k, v = dense(96)
    units = torch.tensor([[[3, 0], [1, 11]], [[2, 5], [11, 7]]])
    index = (units[..., None] * 8 + torch.arange(8)).flatten(2)[..., None]
    for actual, whole in zip(held.gather(units, 8), (k, v), strict=True):
        same(actual, whole.gather(2, index.expand(-1, -1, -1, whole.shape[3])))
    held.reorder(torch.tensor([1, 0, 1]))
    same(held.keys(), k[[1, 0, 1]])


def test_slow_dense_entries_are_counted_when_fetched() -> None:
    held = Dense(slow=True)
    held.append(draw(2, 2, 96, 8), draw(2, 2, 96, 6))
    held.attend(draw(2, 2, 1, 8), Step(0, 1.0))
    assert held.moved == held.read_bytes()
    held.gather(torch.zeros(2, 2, 1, dtype=torch.int64), 8)
    assert held.moved == held.read_bytes() * (1 + 8 / 96)
