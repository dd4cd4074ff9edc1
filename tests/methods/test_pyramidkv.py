"""Known answers of PyramidKV, card A9."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.budgets.slope import falling
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from tests import models
from tests.models import random_ids
from tests.running import feed


@pytest.mark.parametrize(
    ("budget", "window", "entries", "first", "last", "total"),
    [(128, 8, 4096, 234, 17, 4016), (2048, 32, 4096, 3932, 119, 64816), (2048, 32, 3000, 2968, 1077, 64720)],
)
def test_the_pyramid(budget: int, window: int, entries: int, first: int, last: int, total: int) -> None:
    kept = falling(budget - window, entries - window, 32, 20)
    assert (kept[0], kept[-1], sum(kept)) == (first, last, total)


def test_no_slope_and_short_prompts() -> None:
    assert falling(100, 4000, 32, 1) == [100] * 32
    assert falling(100, 99, 32, 20) == [100] * 32
    assert falling(0, 50, 4, 20) == [0] * 4
    clipped = falling(60, 90, 4, 20)
    assert clipped == [90, 70, 50, 30]


@pytest.mark.parametrize(("mode", "flat"), [("paper", False), ("code", True)])
def test_the_released_code_is_flat_where_little_goes(mode: str, flat: bool) -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, calibrate("pyramidkv", dict(budget=0.7, window=2, mode=mode), model=model))
    feed(model, cache, random_ids(1, 50, seed=1), [50])
    cache.finish()
    assert (len(cache.entries().unique()) == 1) == flat


def test_lower_layers_hold_more() -> None:
    model = models.shared("llama")
    plan = calibrate("pyramidkv", dict(budget=0.3, window=2, beta=10), model=model)
    cache = SegmentCache(model, plan)
    feed(model, cache, random_ids(1, 60, seed=1), [60])
    cache.finish()
    entries = cache.entries()
    assert (entries == entries[:, :1]).all()
    assert entries[0, 0] > entries[1, 0] > entries[2, 0]
    assert abs(int(entries.sum()) - 18 * entries.numel()) <= entries.numel()
    assert torch.equal(entries[:, 0], torch.tensor(falling(16, 58, 3, 10)) + 2)
