"""Known answers of KVMerger, card A25; its rules, entry by entry, are in tests/cache/keep/test_merging.py."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import Dense
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.plan import Plan
from kvtool_kernels.ops import attend
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, random, select
from tests.methods.merging import copies, thinned
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, error, same

CALIBRATED = {"mode": "calibrated", "samples": 2, "tokens": 80, "recent": 4, "sink": 1}


def made(**settings: object) -> Plan:
    return calibrate("kvmerger", settings, model=models.with_tokenizer(models.shared("llama")))


def test_a_run_of_equal_keys_is_their_key_and_the_mean_of_their_values() -> None:
    k, v = random(1, K, 30, D), random(1, K, 30, D)
    k[:, :, 10:20] = k[:, :, 10:11]
    made = lane(select("kvmerger", budget=21 / 30, sink=1, recent=2, heavy=0.0))
    (key, value, counts), index = thinned(made, k, v)
    assert counts[0, 0].tolist() == [*[1] * 10, 10, *[1] * 10]
    assert int(index[0, 0, 10]) == 10  # of queries that look nowhere, the first entry gets the most
    close(key[:, :, 10], k[:, :, 10])
    close(value[:, :, 10], v[:, :, 10:20].mean(2))


def test_two_at_a_distance() -> None:
    """w_p = 1 / (1 + exp(−D²/2σ²)), and σ = D where there are but two."""
    k, v = random(1, K, 12, D), random(1, K, 12, D)
    k[:, :, 6] = k[:, :, 5] * 1.5
    (key, value, _), index = thinned(lane(select("kvmerger", budget=11 / 12, sink=0, recent=1, heavy=0.0)), k, v)
    weight = 1 / (1 + math.exp(-0.5))
    assert int(index[0, 0, 5]) == 5
    for got, x in ((key, k), (value, v)):
        close(got[:, :, 5], weight * x[:, :, 5] + (1 - weight) * x[:, :, 6])


def test_heavy_hitters_stand_alone() -> None:
    """All keys are alike, so that runs lie between what stands alone."""
    k = torch.ones(1, K, 40, D) + 0.01 * random(1, K, 40, D)
    k[:, :, 17] = 3.0
    q = torch.ones(1, H, 40, D)
    made = lane(select("kvmerger", budget=5 / 40, sink=1, recent=1, heavy=0.2))
    (_, value, counts), index = thinned(made, k, k, q)
    assert counts[0, 0].tolist() == [1, 16, 1, 21, 1]
    assert int(index[0, 0, 2]) == 17
    close(value[:, :, 2], k[:, :, 17])


def test_every_head_meets_the_budget_exactly() -> None:
    model = models.shared("llama")
    for budget in (0.1, 0.25, 0.5, 0.9):
        cache = SegmentCache(model, made(budget=budget, recent=5))
        feed(model, cache, random_ids(2, 80, seed=1), [80])
        cache.finish()
        assert cache.entries().unique().tolist() == [round(80 * budget)]


@pytest.mark.parametrize("level", ["layer", "head"])
def test_calibrated_thresholds(level: str) -> None:
    plan = made(budget=0.5, level=level, **CALIBRATED)
    epsilon = plan.evidence["epsilon"]
    assert epsilon.shape == (3, 2)
    assert bool((epsilon.abs() < 1).all())
    assert bool((epsilon[:, 0] == epsilon[:, 1]).all()) == (level == "layer")
    model = models.shared("llama")
    cache = SegmentCache(model, plan)
    feed(model, cache, random_ids(1, 80, seed=1), [80])
    cache.finish()
    assert int(cache.entries().max()) <= 40
    assert int(cache.entries().min()) < 40  # thresholds are means: some heads have more links above theirs


@pytest.mark.parametrize(("epsilon", "kept"), [(1.0, 60), (-1.0, 5)])
def test_thresholds_at_both_ends(epsilon: float, kept: int) -> None:
    """1 joins nothing beyond what the budget asks for; −1 leaves one run a gap between what stands alone."""
    made = lane(select("kvmerger", budget=0.75, heavy=0.0, **{**CALIBRATED, "recent": 3, "samples": 1}))
    made.spec.tables["epsilon"][:] = epsilon
    made.heads, made.budget = [0], made.budget[:1]
    k = random(1, 1, 80, D)
    _, index = thinned(made, k, k, torch.zeros(1, H // K, 80, D))
    assert index.shape[2] == kept


def test_counted_runs_of_equal_keys_change_nothing() -> None:
    """As many as there are, with values of their own; without their number, all but one of them are lost."""
    k, v = copies(6, 4)
    v[:, :, 4:24] += random(1, K, 20, D)
    q = random(1, H, 1, D)
    expected = attend(q, k, v, scale=STEP.scale)[0]
    made = lane(select("kvmerger", budget=9 / 24, sink=1, recent=1, heavy=0.0))
    key, value, counts = thinned(made, k, v)[0]
    for count in (True, False):
        held = Dense()
        held.become(key, value, counts, count=count)
        assert (error(held.attend(q, STEP)[0], expected) < 1e-5) == count


@pytest.mark.parametrize("budget", [0.0, 1.5, 64.0])
def test_bad_budgets_are_refused(budget: float) -> None:
    with pytest.raises(InputError, match="budget"):
        made(budget=budget)


def test_layers_that_stay_whole() -> None:
    plan = made(budget=0.5, whole=True)
    assert plan.keep is not None
    assert plan.keep.select is not None
    same(plan.keep.select.budget, torch.ones(3, 2))
