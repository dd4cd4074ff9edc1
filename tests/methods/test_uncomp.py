"""Known answers of UNComp, card A17. Those of its entropy are in tests/statistics/test_query_entropy.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods import uncomp as uncomp_
from kvtool.methods._base import Context
from kvtool.methods.uncomp import caps, falling, groups, reaching, stages
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import trace
from tests.models import random_ids
from tests.running import feed


def uncomp(model: Model, **settings: object) -> Plan:
    needed = ("query-entropy", "state-entropy") if "stages" in settings else ("query-entropy",)
    return calibrate("uncomp", settings, model=model, trace=trace(model, needed))


def test_the_budgets_of_the_released_script() -> None:
    assert caps(64, 0.25, [4, 4]) == [16, 112]
    assert caps(576, 2 / 3, [4, 4]) == [384, 768]


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("sizes", [[1], [1, 1], [1, 2], [4, 4], [2, 2, 2, 2], [1] * 8])
def test_the_mean_is_the_budget_and_no_head_keeps_more_than_all(sizes: list[int], budget: float) -> None:
    made = caps(budget, 0.25, sizes)
    assert made == sorted(made)
    assert made[-1] <= 1 + 1e-9
    mean = sum(size * each for size, each in zip(sizes, made, strict=True)) / sum(sizes)
    assert mean == pytest.approx(budget)


def test_places_are_dealt_into_groups() -> None:
    """The upper group is the larger half, and there are no more groups than heads."""
    assert groups(5, 2).tolist() == [0, 0, 1, 1, 1]
    assert groups(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert groups(3, 32).tolist() == [0, 1, 2]


def test_votes_of_texts_make_four_groups() -> None:
    """Planted: in layer 0 heads 6 and 7 are highest in most texts, and 0 and 1 lowest in all."""
    g = dataclasses.replace(models.shared("llama").geometry, kv_heads=8, query_heads=8)
    places = torch.zeros(g.layers, 8, 8).double()
    for text in range(3):
        order = [0, 1, 2, 3, 4, 5, 6, 7] if text else [1, 0, 6, 7, 4, 5, 2, 3]
        for place, head in enumerate(order):
            places[:, head, place] += 1
    seen = {"places": places, "entropy": torch.zeros(g.layers, 8).double(), "sequences": torch.tensor([3.0])}
    context = Context(g, trace={"query-entropy": seen})  # type: ignore[arg-type]
    plan = uncomp_.calibrate(context, uncomp_.Options(budget=64, groups=4))
    assert plan.facts == {"budgets": [16.0, 48.0, 80.0, 112.0]}
    assert plan.keep is not None
    assert plan.keep.select is not None
    assert plan.keep.select.budget[0].tolist() == [16, 16, 48, 48, 80, 80, 112, 112]
    assert plan.evidence["votes"][0].tolist() == pytest.approx([0, 0, 5 / 3, 5 / 3, 2, 2, 7 / 3, 7 / 3])


def test_the_head_whose_queries_point_one_way_keeps_less() -> None:
    """Planted: KV head 0 of layer 1 has queries along one line."""
    model = models.build("llama")
    g, weight = model.geometry, model.network.model.layers[1].self_attn.q_proj.weight
    queries = weight.data.unflatten(0, (g.query_heads, g.head_dim))
    queries[: g.group, 1:] = 0.0  # one channel alone is left, which RoPE turns in a plane
    plan = uncomp(model, budget=0.4)
    assert plan.keep is not None
    assert plan.keep.select is not None
    assert plan.evidence["votes"][1].tolist() == [0, 1]
    assert plan.keep.select.budget[1].tolist() == pytest.approx([0.1, 0.7])


def test_heads_hold_their_budgets_at_every_step() -> None:
    model = models.double("llama")
    made = uncomp(model, budget=20, window=4)
    cache = SegmentCache(model, made)
    feed(model, cache, random_ids(1, 60, seed=5), [50, *[1] * 10])
    assert made.keep is not None
    assert made.keep.select is not None
    assert cache.entries().tolist() == made.keep.select.budget.tolist()
    assert cache.entries().sort(dim=1).values.tolist() == [[5, 35]] * 3


def test_no_head_holds_less_than_its_window(llama: Model) -> None:
    cache = SegmentCache(llama, uncomp(llama, budget=0.1, window=4))
    feed(llama, cache, random_ids(1, 40, seed=5), [36, *[1] * 4])
    assert int(cache.entries().min()) == 4
    assert bool(torch.isfinite(cache.entries().float()).all())


def test_stages_begin_where_the_entropy_of_states_falls() -> None:
    """A rise begins none, nor a fall of just as much as is allowed."""
    assert stages([3.0, 3.1, 1.9, 1.9, 0.9, 2.5, 1.0], 1.0) == [0, 2, 6]
    assert stages([3.0, 2.0, 1.0], 1.0) == [0]


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("first", [[0], [0, 2, 15, 26, 31], [0, 31]])
def test_later_stages_keep_less_and_the_mean_is_the_budget(first: list[int], budget: float) -> None:
    """Card A17 has the stages of a model of 32 layers."""
    made = falling(budget, 0.5, first, 32)
    assert made == sorted(made, reverse=True)
    assert made[0] <= 1
    assert sum(made) / 32 == pytest.approx(budget)
    assert len({round(each, 6) for each in made}) == (1 if budget == 1 else len(first)) or budget == 0.9
    if budget <= 0.6:
        assert made[-1] == pytest.approx(0.5 * budget if len(first) > 1 else budget)


def collapsing() -> Model:
    """Planted: layer 1 writes along one direction, far more than stands there, so that all states point one way."""
    model = models.build("llama")
    weight = model.network.model.layers[1].mlp.down_proj.weight.data
    weight[1:], weight[0] = 0.0, 1e4 * weight[0]
    return model


def test_layers_behind_a_collapse_of_states_keep_less() -> None:
    model = collapsing()
    made = uncomp(model, budget=40, stages=True, decode="append")
    assert made.provenance["facts"]["stages"] == [0, 1]
    cache = SegmentCache(model, made)
    feed(model, cache, random_ids(1, 120, seed=5), [119, 1])
    held = cache.entries().sum(1).tolist()
    assert held[0] > held[1] == held[2]
    assert made.keep is not None
    assert made.keep.select is not None
    assert made.keep.select.budget.mean(1).tolist() == [80, 20, 20]
    plain = uncomp(model, budget=40, decode="append")
    assert plain.keep is not None
    assert plain.keep.select is not None
    assert plain.keep.select.budget.mean(1).tolist() == [40, 40, 40]
    assert "stages" not in plain.provenance["facts"]


@pytest.mark.parametrize(
    ("first", "shares"), [([0], [1.0] * 4), ([0, 2], [1, 1, 0.4, 0.4]), ([0, 1, 3], [1, 0.7, 0.7, 0.4])]
)
def test_shares_fall_in_equal_steps_from_stage_to_stage(first: list[int], shares: list[float]) -> None:
    assert reaching(0.4, first, 4) == pytest.approx(shares)


def test_tokens_leave_the_prompt_behind_a_collapse_of_states() -> None:
    """Half of 120 tokens reach layers 1 and 2, which keep an eighth of the prompt as they would if all had come: a
    quarter of that in one head, or the window of 8, and seven quarters in the other."""
    model = collapsing()
    made = uncomp(model, budget=0.25, stages=True, reach=0.5, decode="append")
    assert made.provenance["facts"]["reach"] == [1.0, 0.5, 0.5]
    assert not made.dense
    cache = SegmentCache(model, made)
    logits = feed(model, cache, random_ids(1, 126, seed=5), [120, *[1] * 6])
    assert logits.shape[1] == 60 + 6
    assert bool(torch.isfinite(logits).all())
    assert (cache.entries() - 6).sort(1).values.tolist() == [[15, 105], [8, 26], [8, 26]]


def test_a_prompt_without_stages_is_read_whole(llama: Model) -> None:
    with pytest.raises(InputError, match="reach"):
        uncomp(llama, reach=0.5)
    assert uncomp(llama, stages=True).dense
