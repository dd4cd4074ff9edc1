"""Known answers of CompressKV, card A4. Its head score is in tests/statistics/, its errors in test_sensitivity."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.methods._layers import allotted
from kvtool.methods.compresskv import voting
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Select
from tests import models
from tests.laws.methods import trace
from tests.models import INDUCTION, random_ids, repeated
from tests.running import feed, rows_held


def compresskv(model: Model, **settings: object) -> Plan:
    small = {"samples": 2, "tokens": 240, "steps": 2, "probe": 16, "floor": 8}
    seen = trace(model, ("retrieval",))
    return calibrate("compresskv", {**small, **settings}, model=models.with_tokenizer(model), trace=seen)


def select(plan: Plan) -> Select:
    assert plan.keep is not None
    assert plan.keep.select is not None
    return plan.keep.select


def test_the_budgets_of_the_card() -> None:
    wide = dict(floor=32, cap=1 << 31)
    assert allotted([0.1, 0.2, 0.3, 0.4], 128, **wide) == [70, 109, 147, 186]
    assert allotted([0.0, 0.0, 0.1, 0.9], 128, **wide) == [32, 32, 70, 378]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("budget", "floor", "cap"), [(64, 32, 1 << 31), (64, 32, 100), (20, 32, 60), (9, 1, 9)])
def test_budgets_sum_to_the_budget_within_their_bounds(seed: int, budget: int, floor: int, cap: int) -> None:
    score = torch.rand(12, generator=torch.Generator().manual_seed(seed)) ** 5
    counts = allotted((score / score.sum()).tolist(), budget, floor=floor, cap=cap)
    assert sum(counts) == 12 * budget
    assert min(counts) >= min(floor, budget)
    assert max(counts) <= min(3 * budget, max(cap, budget))


def test_the_best_heads_of_each_layer_vote() -> None:
    mass = torch.tensor([[0.1, 0.9, 0.3, 0.3], [0.0, 0.0, 0.0, 0.2]])
    assert voting(mass, 2).tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert voting(mass, 0).tolist() == [[1] * 4] * 2


def test_the_induction_head_votes_for_all(induction: Model) -> None:
    """What the last copies need stays if it alone is heard, and goes if a head is that looks nowhere."""
    plan = compresskv(induction, heads=1, budget=0.1, window=2, kernel=3, layers="equal")
    assert plan.provenance["facts"] == {"answered": 3, "voting": 1}
    votes = select(plan).weights
    assert votes is not None
    layer, head = INDUCTION
    assert votes[layer].tolist() == [float(at == head) for at in range(4)]
    ids = repeated(40, 2)[None, :75]  # the last two look at the tokens after their first copies, 34 and 35
    assert {33, 34, 35, 36, 73, 74} <= set(rows_held(induction, plan, ids, [75], layer)[head])
    other = dataclasses.replace(select(plan), weights=votes.roll(1, dims=1))
    assert plan.keep is not None
    moved = dataclasses.replace(plan, keep=dataclasses.replace(plan.keep, select=other))
    assert not {33, 34, 35, 36} & set(rows_held(induction, moved, ids, [75], layer)[head])


def test_layers_that_err_keep_more_and_all_heads_the_same(llama: Model) -> None:
    plan = compresskv(llama, budget=0.3, window=3)
    shares, errors = select(plan).budget, plan.evidence["error"]
    assert float(errors.sum()) == pytest.approx(1.0)
    assert bool((shares == shares[:, :1]).all())
    assert float(shares.mean()) == pytest.approx(round(0.3 * 240) / 240)
    assert shares[:, 0].argsort().tolist() == errors.argsort().tolist()
    cache = SegmentCache(llama, plan)
    feed(llama, cache, random_ids(1, 60), [60])
    cache.finish()
    held = [len(lane.heads) for layer in cache.segments for lane in layer.lanes()]
    assert held == [llama.geometry.kv_heads] * llama.geometry.layers


def test_a_model_that_answers_no_needle_lets_all_heads_vote(llama: Model) -> None:
    plan = compresskv(llama, heads=2, layers="equal")
    assert plan.provenance["facts"] == {"answered": 0, "voting": 6}
