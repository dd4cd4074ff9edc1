"""Known answers of PrefixKV, card A16. Those of its search are in tests/cache/keep/test_layer_budgets.py."""

from __future__ import annotations

import itertools

import pytest

from kvtool.calibrate import calibrate
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.models import random_ids
from tests.running import rows_held
from tests.tolerance import same


def prefixkv(model: Model, **settings: object) -> Plan:
    return calibrate("prefixkv", {"samples": 2, "tokens": 240, **settings}, model=models.with_tokenizer(model))


@pytest.mark.parametrize("mode", ["prompt", "calibrated"])
def test_all_heads_of_a_layer_hold_the_same_entries_sinks_and_the_last_among_them(mode: str) -> None:
    model = models.double("llama")
    plan = prefixkv(model, budget=0.4, mode=mode)
    first, second = rows_held(model, plan, random_ids(1, 40, seed=2), [40])
    assert first == second
    assert {0, 1, 2, 3, 39} <= set(first)


def test_decode_steps_drop_what_stands_at_a_distance() -> None:
    """What stands `distance` before the newest goes, whatever it scores; the layer's share is held."""
    model, distance = models.double("llama"), 5
    plan = prefixkv(model, budget=0.5, mode="prompt", distance=distance, sink=2)
    ids = random_ids(1, 60, seed=3)
    held = [rows_held(model, plan, ids[:, : 40 + steps], [40, *[1] * steps])[0] for steps in range(1, 20)]
    share = len(rows_held(model, plan, ids[:, :40], [40])[0]) / 40
    for steps, (before, after) in enumerate(itertools.pairwise(held), 2):
        assert len(after) == round(share * (40 + steps))
        came = [*before, 39 + steps]
        gone = [came.index(row) for row in came if row not in after]
        assert gone in ([], [len(came) - 1 - distance])
    assert sum(len(after) == len(before) for before, after in itertools.pairwise(held)) > 5


def test_calibrated_layers_hold_the_budget_in_the_mean(llama: Model) -> None:
    plan = prefixkv(llama, budget=0.3)
    assert plan.keep is not None
    assert plan.keep.select is not None
    shares = plan.keep.select.budget
    assert float(shares.mean()) == pytest.approx(round(0.3 * 240) / 240)
    assert len(shares[:, 0].unique()) > 1
    same(plan.evidence["share"], shares)
