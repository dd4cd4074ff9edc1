"""Known answers of PyramidKV, card A9."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.budgets.slope import falling
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.methods import pyramidkv
from kvtool.methods._base import Context
from kvtool.methods.pyramidkv import dealt, rungs
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


CALIBRATED = dict(mode="calibrated", samples=2, tokens=240, steps=2, window=2)


def test_the_layer_that_errs_more_with_little_keeps_more() -> None:
    """Errors fall to 0 at 3 rungs: layer 1 saves 0.5 a rung first, then layer 0 0.2; layer 2 saves next to nothing."""
    error = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.5, 0.1], [0.02, 0.01, 0.0]])
    assert dealt([10, 20, 30], error, 20, 2) == [20, 30, 10]
    assert dealt([10, 20, 30], error, 17, 2) == [11, 30, 10]  # what is over does not reach another rung
    assert dealt([10, 20, 30], error.flip(0), 20, 2) == [10, 30, 20]


def test_rungs_leave_the_window_and_end_with_the_prompt() -> None:
    assert rungs(256, 8, 1024) == [64, 128, 192, 256, 320, 384, 512, 768]
    assert rungs(20, 8, 50) == [9, 10, 15, 20, 25, 30, 40, 50]


def test_calibrated_layers_hold_the_mean_budget() -> None:
    model = models.with_tokenizer(models.double("llama"))
    plan = calibrate("pyramidkv", {**CALIBRATED, "budget": 0.25}, model=model)
    assert plan.keep is not None
    assert plan.keep.select is not None
    budget, error = plan.keep.select.budget, plan.evidence["error"]
    assert float(budget.mean()) == pytest.approx(0.25)
    assert len(budget[:, 0].unique()) > 1
    assert bool((budget == budget[:, :1]).all())
    assert error.shape == (3, 8)
    assert bool((error[:, 0] > error[:, -1]).all())
    cache = SegmentCache(model, plan)
    feed(model, cache, random_ids(1, 60, seed=1), [60])
    cache.finish()
    assert cache.entries()[:, 0].tolist() == [round(60 * share) for share in budget[:, 0].tolist()]


@pytest.mark.parametrize("budget", [1.0, 900])
def test_nothing_is_measured_where_nothing_goes(budget: float) -> None:
    geometry = models.shared("llama").geometry
    keep = pyramidkv.calibrate(Context(geometry), pyramidkv.Options(mode="calibrated", budget=budget, tokens=240)).keep
    assert keep is not None
    assert keep.select is not None
    assert bool((keep.select.budget == budget).all())
