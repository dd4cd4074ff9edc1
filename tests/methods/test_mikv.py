"""MiKV: the balancer, and what becomes of what eviction would drop."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.plan import compose
from tests import models
from tests.laws.methods import plan
from tests.methods.coding import bits, entries
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close


def lanes(cache: SegmentCache) -> list[Thinned]:
    return [lane for layer in cache.segments for lane in layer.lanes() if isinstance(lane, Thinned)]


def test_an_outlier_channel_gives_its_size_to_the_query() -> None:
    """A key channel 50 times the others ruins its tokens' ranges, unless it is balanced first."""
    store = plan("mikv", models.shared("llama"), {"bits": 3}).store
    assert store is not None
    assert store.rest is not None
    k, q = entries(1, 2, 64, 8), entries(1, 2, 64, 8, seed=1)
    k[..., 3] *= 50
    errors = []
    for encoding in (store.rest.keys[0].fitted(k, q), plan_without_balance()):
        there = encoding.decode(encoding.encode(k), 8)
        errors.append(float((q @ (there - k).mT).square().mean()))
    assert errors[0] < errors[1] / 10


def plan_without_balance():
    store = plan("mikv", models.shared("llama"), {"bits": 3, "balance": False}).store
    assert store is not None
    assert store.rest is not None
    return store.rest.keys[0]


def test_high_and_low_entries_are_all_there() -> None:
    model = models.double("llama")
    cache = SegmentCache(model, plan("mikv", model, {"high": 0.25, "recent": 2, "bits": 4}))
    feed(model, cache, random_ids(1, 40), [40])
    cache.finish()
    for lane in lanes(cache):
        assert lane.rest is not None
        assert (lane.recent.length, lane.rest.length) == (10, 30)
    feed(model, cache, random_ids(1, 4, seed=1), [1, 1, 1, 1])
    for lane in lanes(cache):
        assert lane.rest is not None
        assert (lane.recent.length, lane.rest.length) == (11, 33)  # a quarter of 44 tokens


def test_fewer_bits_than_eviction_loses_less() -> None:
    """What eviction drops is worth its few bits: the output is nearer to the full cache's."""
    model, ids = models.double("llama"), random_ids(1, 60)
    whole = feed(model, SegmentCache(model), ids, [50, *[1] * 10])[:, 50:]
    errors = []
    for name, settings in (("h2o", {"heavy": 0.1, "recent": 0.1}), ("mikv", {"high": 0.2, "recent": 5, "bits": 4})):
        out = feed(model, SegmentCache(model, plan(name, model, settings)), ids, [50, *[1] * 10])[:, 50:]
        errors.append(float((out - whole).square().mean()))
    assert errors[1] < errors[0] / 4


def test_any_selection_may_choose() -> None:
    model, ids = models.double("llama"), random_ids(1, 50)
    lower = plan("mikv", model, {"policy": "given", "bits": 8, "balance": False})
    with pytest.raises(InputError, match="no selection drops any"):
        SegmentCache(model, lower)
    both = compose(plan("snapkv", model, {"budget": 0.2, "window": 4, "kernel": 1}), lower)
    cache = SegmentCache(model, both)
    feed(model, cache, ids, [49, 1])
    assert {lane.entries() for lane in lanes(cache)} == {50}
    merging = plan("d2o", model, {"hh": 0.2, "recent": 0.2, "whole": False})
    with pytest.raises(InputError, match="held once more"):
        compose(merging, lower)


def test_all_high_is_exact() -> None:
    model, ids = models.double("llama"), random_ids(1, 30)
    cache = SegmentCache(model, plan("mikv", model, {"high": 1.0, "when": "prefill"}))
    close(feed(model, cache, ids, [25, *[1] * 5]), feed(model, SegmentCache(model), ids, [25, *[1] * 5]))


def test_bits_are_those_of_the_card() -> None:
    store = plan("mikv", models.shared("llama"), {"bits": 2, "balance": False}).store
    assert store is not None
    assert store.rest is not None
    assert bits(store.rest.keys[0], 2, 8) == 2 + 32 / 8
    assert bool(torch.equal(store.index, torch.full_like(store.index, -1)))
