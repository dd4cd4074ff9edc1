"""Precision by age, and what eviction demotes: which entries are where, and what is held of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.keep.selector import Selector
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.lane import Step
from kvtool.cache.segments import GROWTH
from kvtool.cache.store.coded import Coded
from kvtool.cache.store.rest import Rest
from kvtool.cache.store.tiers import Tiers
from kvtool.encoding.codecs import Affine, Raw
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Ranges
from kvtool.slots import Select
from kvtool_kernels.ops import attend
from tests.tolerance import close, same

DRAW = torch.Generator().manual_seed(0)
STEP = Step(0, 0.5)
D = 8


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def pair(bits: int) -> tuple[Encoding, Encoding]:
    return Encoding(Affine(bits, 8, "token")), Encoding(Affine(bits, 8, "channel"))


def tiers() -> Tiers:
    return Tiers([Coded(*pair(bits)) for bits in (8, 4, 2)], [16, 8], 8, lambda low, high: torch.arange(low, high))


@pytest.mark.parametrize("count", [8, 16, 24, 32, 80])
def test_entries_move_on_in_order(count: int) -> None:
    made, k, v = tiers(), random(1, 2, count, D), random(1, 2, count, D)
    made.append(k, v)
    lengths = [tier.length for tier in made.tiers]
    assert lengths == [min(count, 16), min(max(count - 16, 0), 8), max(count - 24, 0)]
    error = (made.recall()[0] - k).abs().amax((0, 1, 3))
    bounds = [1.2, 0.6, 0.03]  # of 2, 4 and 8 bits, oldest first
    for bound, part in zip(bounds, error.split(lengths[::-1]), strict=True):
        assert bool((part < bound).all())
    same(made.keys(), made.recall()[0])


def test_what_is_held_does_not_depend_on_the_cut() -> None:
    k, v = random(1, 2, 80, D), random(1, 2, 80, D)
    whole, parts = tiers(), tiers()
    whole.append(k, v)
    for low in range(0, 80, 16):
        parts.append(k[:, :, low : low + 16], v[:, :, low : low + 16])
    for one, other in zip(whole.buffers(), parts.buffers(), strict=True):
        same(one, other)


def test_dropped_bits_err_by_half_a_step_at_most() -> None:
    k, v = random(1, 2, 80, D), random(1, 2, 80, D)
    made = tiers()
    made.append(k, v)
    old = slice(0, made.tiers[2].length)
    grouped = k[:, :, old].unflatten(2, (-1, 8))
    step = (grouped.amax(3) - grouped.amin(3)) / 255 * 64  # of two bits left of eight
    bound = step.repeat_interleave(8, 2) / 2
    error = (made.recall()[0] - k)[:, :, old].abs()
    assert bool((error <= bound * 1.01 + 1e-3).all())
    assert float((error / bound).max()) > 0.9


def test_attention_is_over_all_tiers() -> None:
    made, k, v = tiers(), random(1, 2, 80, D), random(1, 2, 80, D)
    made.append(k, v)
    q = random(1, 4, 1, D)
    out, lse = made.attend(q, STEP)
    expected, expected_lse = attend(q, *made.recall(), **STEP.options)
    close(out, expected)
    close(lse, expected_lse)


def test_an_encoding_that_cannot_drop_bits_is_written_again() -> None:
    raw = (Encoding(Raw("float16")), Encoding(Raw("float16")))
    made = Tiers([Coded(*raw), Coded(*pair(4))], [8], 8, lambda low, high: torch.arange(low, high))
    k, v = random(1, 2, 24, D), random(1, 2, 24, D)
    made.append(k, v)
    direct = Coded(*pair(4))
    direct.append(k[:, :, :16].half().float(), v[:, :, :16].half().float())
    same(made.recall()[0][:, :, :16], direct.recall()[0])


def thinned(lower: Coded, block: int, kept: int, when: str = "prefill") -> Thinned:
    spec = Select(torch.full((1, 2), float(kept)), observe="all", reduce="sum", when=when, group="sum")  # type: ignore[arg-type]
    return Thinned([0, 1], selector=Selector(spec, [float(kept)] * 2, 0, [0, 1]), rest=Rest(lower, block))


def fed(lane: Bulk, count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = random(1, 4, count, D), random(1, 2, count, D), random(1, 2, count, D)
    lane.step(q, k, v, Step(first, 0.5))
    return q, k, v


@pytest.mark.parametrize("block", [1, 8])
def test_what_is_dropped_is_held_lower(block: int) -> None:
    key = Encoding(Raw("float16")) if block == 1 else Encoding(Affine(8, 8, "token"))
    lane = thinned(Coded(key, Encoding(Raw("float16"))), block, 10)
    _, k, v = fed(lane, 31)
    step = Step(0, 0.5)
    view = lane.view(step)
    assert lane.selector is not None
    scores = lane.selector.scores(view)
    lane.thin(view, scores, 10, scores)
    lane.finish()
    assert lane.rest is not None
    assert (lane.recent.length, lane.rest.length, lane.entries()) == (10, 21, 31)
    assert lane.rest.coded.length == 21 // block * block
    best = scores.topk(10, dim=-1).indices.sort(-1).values
    same(lane.recent.recall()[0], k.gather(2, best[..., None].expand(-1, -1, -1, D)))
    got = lane.recall()[0].sort(2).values
    torch.testing.assert_close(got, k.sort(2).values, atol=0.02, rtol=0.02)
    assert sum(buffer.nbytes for buffer in lane.buffers()) < k.nbytes + v.nbytes + 4 * GROWTH * D * 4 * 2


def test_entries_are_demoted_at_every_step() -> None:
    lane = thinned(Coded(Encoding(Raw("float16")), Encoding(Raw("float16"))), 1, 10, "step")
    lane.selector.limit = 10  # type: ignore[union-attr]
    _, first, _ = fed(lane, 10)
    lane.finish()
    keys = [first]
    for step in range(10, 16):
        keys.append(fed(lane, 1, step)[1])
        assert lane.rest is not None
        assert (lane.recent.length, lane.rest.length) == (10, step - 9)
    torch.testing.assert_close(lane.recall()[0].sort(2).values, torch.cat(keys, 2).sort(2).values, atol=4e-3, rtol=4e-3)


def test_keys_before_rope_come_back_at_their_own_positions() -> None:
    """Positions go with what is dropped: turned back, encoded, turned forward again."""
    from tests import models

    rotary = models.shared("llama").rotary(0)
    lower = Coded(Encoding(Raw("float16"), rotated=False), Encoding(Raw("float16")), rotary)
    lane = thinned(lower, 1, 4)
    _, k, _ = fed(lane, 20)
    view = lane.view(STEP)
    scores = lane.selector.scores(view)  # type: ignore[union-attr]
    lane.thin(view, scores, 4, scores)
    assert lane.rest is not None
    worst = torch.ones(1, 2, 20, dtype=torch.bool).scatter(2, scores.topk(4, dim=-1).indices, False)
    expected = k[worst].reshape(1, 2, 16, D)
    torch.testing.assert_close(lane.rest.recall()[0], expected, atol=4e-3, rtol=4e-3)


def test_fitted_encodings_wait_for_the_end_of_the_prompt() -> None:
    lane = Bulk([0, 1], recent=2, block=1, key=Encoding(Ranges(4)), value=Encoding(Affine(4, 8, "channel")))
    keys = [fed(lane, 7)[1], fed(lane, 5, 7)[1]]
    assert (lane.recent.length, lane.bulk.length) == (12, 0)
    lane.finish()
    assert (lane.recent.length, lane.bulk.length) == (2, 10)
    assert isinstance(lane.bulk, Coded)
    codec = Ranges(4).fit(torch.cat(keys, 2)[:, :, :10])
    same(lane.bulk.parts["key"]["codes"], codec.encode(torch.cat(keys, 2)[:, :, :10])["codes"])
    held = [buffer for buffer in lane.bulk.buffers() if buffer.shape == (2, 8)]
    assert len(held) == 2  # ranges of 2 heads and 8 channels, on the ledger
    before = lane.bulk.parts["key"]["codes"].clone()
    fed(lane, 1, 12)
    same(lane.bulk.parts["key"]["codes"][:, :, :10], before)
    assert [lane.bulk.length, *itertools.accumulate([lane.recent.length])] == [11, 2]
