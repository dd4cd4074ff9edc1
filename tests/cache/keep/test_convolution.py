"""Slots that hold mixtures: the definition entry by entry, and the answers of card LoCoCo."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.cache.keep.merges.convolution import mixed, others, slots, weights
from kvtool.cache.keep.picks._base import best
from tests.tolerance import close, same

B, K, S, D, WIDTH = 2, 2, 23, 4, 5
DRAW = torch.Generator().manual_seed(1)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


KEY, VALUE, SCORES = random(B, K, S, D), random(B, K, S, D), random(B, K, S)


def tables(channels: int, share: float, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    one = torch.tensor(share, dtype=torch.float64)
    return scale * random(channels, 2 * D, WIDTH), scale * random(channels), one


def run(count: int, own: tuple[torch.Tensor, ...], sink: int = 0, recent: int = 0):
    index = best(SCORES, count, slice(sink, S - recent))
    return index, mixed((KEY, VALUE), SCORES, index, own, slice(sink, S - recent))


def by_hand(row: int, head: int, count: int, own: tuple[torch.Tensor, ...], sink: int, recent: int):
    """(k, v) lists of what is held, in order."""
    kernel, bias, share = own
    sure = [at for at in range(S) if at < sink or at >= S - recent]
    ranked = sorted((at for at in range(S) if at not in sure), key=lambda at: -float(SCORES[row, head, at]))
    kept = sorted(sure + ranked[: count - len(sure)])
    number = min(len(bias), count // 2, count - len(sure))
    anchors = sorted(ranked[: count - len(sure)][count - len(sure) - number :])
    rest = [at for at in range(S) if at not in kept or at in anchors]
    x = [torch.cat([KEY[row, head, at], VALUE[row, head, at]]) for at in rest]
    out = []
    for at in kept:
        pair = [KEY[row, head, at], VALUE[row, head, at]]
        if at in anchors:
            channel = anchors.index(at)
            logits = []
            for place in range(len(rest)):
                total = float(bias[channel])
                for tap in range(WIDTH):
                    near = place + tap - WIDTH // 2
                    if 0 <= near < len(rest):
                        total += float(kernel[channel, :, tap] @ x[near])
                logits.append(max(0.0, total))
            each = [math.exp(logit) for logit in logits]
            for side, source in enumerate((KEY, VALUE)):
                mean = sum(w * source[row, head, e] for w, e in zip(each, rest, strict=True)) / sum(each)
                pair[side] = (1 - share) * pair[side] + share * mean
        out.append(pair)
    return [torch.stack(side) for side in zip(*out, strict=True)]


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 3)])
@pytest.mark.parametrize(("count", "channels"), [(8, 4), (11, 3), (9, 40)])
def test_the_definition(count: int, channels: int, sink: int, recent: int) -> None:
    own = tables(channels, 0.3)
    _, sides = run(count, own, sink, recent)
    for row in range(B):
        for head in range(K):
            for got, expected in zip(sides, by_hand(row, head, count, own, sink, recent), strict=True):
                close(got[row, head], expected)


def test_without_a_share_it_is_the_selection() -> None:
    """Card: λ = 0 is the top M."""
    index, (k, v) = run(10, tables(5, 0.0))
    for got, source in ((k, KEY), (v, VALUE)):
        same(got, source.gather(2, index[..., None].expand(-1, -1, -1, D)))


def test_a_convolution_of_zeros_averages_the_rest() -> None:
    """Card: at λ = 1 every slot is the mean of what is not kept whole."""
    index, sides = run(10, tables(5, 1.0, scale=0.0))
    places = slots(SCORES, index, 5, slice(None))
    rest = others(index, places, S)
    assert rest.shape[2] == S - 5
    for got, source in zip(sides, (KEY, VALUE), strict=True):
        mean = source.gather(2, rest[..., None].expand(-1, -1, -1, D)).mean(2, keepdim=True)
        close(got.gather(2, places[..., None].expand(-1, -1, -1, D)), mean.expand(-1, -1, 5, -1))


def test_rows_sum_to_one() -> None:
    """So equal values stay what they are, whatever mixes them."""
    kernel, bias, _ = tables(6, 1.0, scale=3.0)
    weight = weights(KEY, VALUE, kernel, bias)
    assert weight.shape == (B, K, 6, S)
    close(weight.sum(-1), torch.ones(B, K, 6, dtype=torch.float64))


def test_no_more_entries_than_slots_are_left_alone() -> None:
    """Card: n' ≤ M / 2 skips."""
    everything = torch.arange(S).expand(B, K, -1)
    for got, source in zip(
        mixed((KEY, VALUE), SCORES, everything, tables(40, 1.0), slice(None)), (KEY, VALUE), strict=True
    ):
        same(got, source)
    single = SCORES.argmax(-1, keepdim=True)
    k, _ = mixed((KEY, VALUE), SCORES, single, tables(4, 1.0), slice(None))  # half of one entry is none
    same(k, KEY.gather(2, single[..., None].expand(-1, -1, -1, D)))


def test_sinks_and_recent_entries_are_never_slots() -> None:
    index = best(SCORES, 9, slice(2, S - 4))
    places = slots(SCORES, index, 40, slice(2, S - 4))
    assert places.shape[2] == 3
    held = index.gather(2, places)
    assert int(held.min()) >= 2
    assert int(held.max()) < S - 4
    assert bool((places.diff(dim=-1) > 0).all())
