"""Budgets that layers share by what their attention looks like: known answers, and the rules' words on a tiny model."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.cache.keep.budgets import information, preference
from kvtool.cache.keep.budgets._base import Ballot
from kvtool.cache.keep.scores._base import View
from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Select
from tests import models
from tests.models import random_ids
from tests.running import feed
from tests.statistics.naive import written_down
from tests.tolerance import close

PROMPT = 60
IDS = random_ids(1, PROMPT, seed=9)


def cached(model: Model, budget: float, **options) -> SegmentCache:
    """A cache that has thinned PROMPT tokens."""
    g = model.geometry
    select = Select(torch.full((g.layers, g.kv_heads), budget), **options)
    keep = Keep.heads(torch.ones(g.layers, g.kv_heads), sink=0, recent=1, select=select)
    cache = SegmentCache(model, Plan("shared", model.fingerprint, keep=keep), prompt_length=PROMPT)
    feed(model, cache, IDS, [PROMPT])
    assert cache.nbytes > 0
    cache.finish()
    return cache


# preference


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([10.9, 20.2, 69.9], [21, 29, 50]), ([0.0, 0.0, 100.0], [25, 25, 50]), ([33.3] * 3, [34, 33, 33])],
)
def test_the_adjustment_of_the_card(wanted: list[float], expected: list[int]) -> None:
    assert preference.adjusted(wanted, 100, 50) == expected


@pytest.mark.parametrize("seed", range(20))
def test_the_adjustment_meets_the_total_under_the_cap(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(30, generator=draw) ** 6  # a few layers want nearly all
    total = 30 * 64
    counts = preference.adjusted((total * weights / weights.sum()).tolist(), total, 100)
    assert sum(counts) == total
    assert max(counts) <= 100
    assert min(counts) >= 0
    assert preference.adjusted([5.0] * 4, 20, 3) == [3] * 4  # no more than there is


def test_the_entropy_of_uniform_attention() -> None:
    """Card CAKE: heads · queries · ln n if all queries see the same n entries, and no variance."""
    heads, rows, entries = 4, 6, 40
    q, k = torch.zeros(1, heads, rows, 8), torch.randn(1, 2, entries + 1, 8)
    spec = Select(torch.ones(1, 2), observed=rows, spread="preference", settings={"tau1": 1.0, "tau2": 1.0})
    view = View(q, torch.full((rows,), entries - 1), k, k, 1.0, None, spec, 0, [0, 1])
    ballot = Ballot(view, torch.zeros(1, 2, entries + 1), [20, 20], slice(0, entries))
    entropy, variance = preference.spread(ballot)
    close(torch.tensor(entropy), torch.tensor(heads * rows * math.log(entries)), torch.float32)
    assert variance < 1e-12


@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.6, 0.4), (0.5, 0.5)])
def test_layers_hold_in_proportion_to_their_preference(tau1: float, tau2: float) -> None:
    model, window = models.double("llama"), 5
    cache = cached(model, 0.4, observed=window, recent=window, spread="preference",
                   settings={"tau1": tau1, "tau2": tau2})  # fmt: skip
    held = cache.entries()
    layers = model.geometry.layers
    assert bool((held == held[:, :1]).all())
    assert int(held[:, 0].sum()) == layers * round(0.4 * PROMPT)
    weights = []
    for layer in written_down(model, IDS[0]):
        a = layer.weights[:, -window:, :-window]
        entropy = -(a * a.log()).nan_to_num().sum()
        weights.append(float(entropy ** (1 / tau1) * a.var(dim=1).sum() ** (1 / tau2)))
    free = layers * (round(0.4 * PROMPT) - window)
    wanted = [free * weight / sum(weights) for weight in weights]
    assert max(wanted) <= PROMPT - window  # or the cap would bind
    assert max(wanted) - min(wanted) > 3  # or any rule would do
    for count, want in zip((held[:, 0] - window).tolist(), wanted, strict=True):
        assert int(want) <= count <= int(want) + 1


def test_a_restless_layer_keeps_more() -> None:
    """Two layers, one whose queries look elsewhere each, one whose queries look at the same place."""
    entries, rows, width = 64, 8, 8
    spec = Select(torch.full((2, 1), 0.25), observed=rows, spread="preference", settings={"tau1": 1.0, "tau2": 1.0})
    k = torch.eye(width).repeat(entries // width, 1)[None, None]
    still, restless = torch.zeros(1, 1, rows, width), torch.zeros(1, 1, rows, width)
    still[..., 0], restless[0, 0] = 4.0, 4 * torch.eye(width)
    where = torch.full((rows,), entries - 1)
    ballots = [
        Ballot(View(q, where, k, k, 1.0, None, spec, layer, [0]), torch.zeros(1, 1, entries), [16], slice(0, 60))
        for layer, q in enumerate((still, restless))
    ]
    (least,), (most,) = preference.deal(ballots)
    assert (least, most) == (4, 28)


def test_where_no_layer_is_preferred_all_keep_the_same() -> None:
    assert preference.shares([0.0, 0.0]) == preference.shares([math.inf, 1.0]) == [0.5, 0.5]


# information


def test_the_threshold_of_the_card() -> None:
    """Two layers of 100 entries, 100 to be forgotten: at .8125 they forget 86 and 13; the budget is met with 86, 14."""
    peak = torch.cat([torch.full((10,), 100.0), torch.full((90,), 0.1)])
    curves = [information.curve(peak), information.curve(torch.ones(100))]
    assert [100 - count for count in information.held(curves, 0.8125, 5)] == [86, 13]
    assert [100 - count for count in information.shared(curves, 100, 5)] == [86, 14]


@pytest.mark.parametrize("total", [60, 61, 100, 239])
def test_equal_layers_hold_the_same(total: int) -> None:
    curves = [information.curve(torch.rand(80, generator=torch.Generator().manual_seed(1)))] * 3
    counts = information.shared(curves, total, 2)
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


def test_a_budget_below_the_lowest_threshold_is_shared_equally() -> None:
    assert information.shared([information.curve(torch.ones(9))] * 2, 3, 4) == []
    assert information.curve(torch.zeros(4)).tolist() == [0.25, 0.5, 0.75, 1.0]


def test_all_layers_hold_the_same_share_of_their_attention() -> None:
    model = models.double("llama")
    cache = cached(model, 0.4, observe="all", reduce="sum", alike=True, sink=2, recent=1, spread="information")
    held = cache.entries()[:, 0].tolist()
    assert sum(held) == 3 * round(0.4 * PROMPT)
    assert max(held) > min(held)
    low, high = [], []
    for layer, count in zip(written_down(model, IDS[0]), held, strict=True):
        best = layer.weights.mean(0).sum(0).sort(descending=True).values
        share = best.cumsum(0) / best.sum()
        low.append(float(share[count - 3 - 2]))
        high.append(float(share[count - 3 - 1]))
    assert max(low) < min(high)  # there is a p that gives each layer its number
