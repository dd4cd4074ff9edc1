"""Known answers of D2O, card A18; its rules, entry by entry, are in tests/cache/keep/test_merging.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.plan import Plan
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, random, select
from tests.methods.merging import copies, thinned
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same


def made(**settings: object) -> Plan:
    return calibrate(
        "d2o", {"whole": False, "sink": 1, **settings}, model=models.with_tokenizer(models.shared("llama"))
    )


def test_copies_change_nothing() -> None:
    """All cosines are 1, the threshold too, and everything joins."""
    k, v = copies(6, 4)
    made = lane(select("d2o", hh=0.125, recent=0.125, whole=False))
    made.observe(torch.zeros(1, H, 24, D), 0, k, v, STEP, {})
    view = made.view(k, v, STEP, {})
    index = torch.arange(2, 24, 4).expand(1, K, -1)
    job = made.job(view, made.scores(view), torch.ones(1, K, 24), index)
    key, value, counts = made.spec.rule("merge").merge(job)
    close(key, k[:, :, 2::4])
    close(value, v[:, :, 2::4])
    assert counts.unique().tolist() == [4.0]


def test_about_half_of_what_leaves_joins() -> None:
    k = random(1, K, 400, D)
    (_, _, counts), index = thinned(lane(select("d2o", hh=0.1, recent=0.1, whole=False)), k, k)
    joined = (float(counts.sum()) - index.numel()) / (K * 400 - index.numel())
    assert 0.35 < joined < 0.65


def test_equal_cosines_all_pass() -> None:
    k = torch.zeros(1, K, 20, D)
    k[..., 0], k[..., 1] = 0.8, 0.6
    k[:, :, 0, :2] = torch.tensor([1.0, 0.0])
    (_, _, counts), _ = thinned(lane(select("d2o", hh=0.05, recent=0.0, sink=0, whole=False)), k, k)
    assert counts.tolist() == [[[20.0]] * K]


def test_a_heavy_key_stays_its_likes_join_and_a_stranger_goes() -> None:
    k, v = 0.01 * random(1, K, 40, D), random(1, K, 40, D)
    k[:, :, 10] = k[:, :, 20] = torch.tensor([0.0, 0.0, 3.0, 0, 0, 0, 0, 0])
    k[:, :, 20] *= 0.5  # alike, but looked at less
    k[:, :, 30] = torch.tensor([0.0, 0.0, -3.0, 0, 0, 0, 0, 0])
    q = torch.zeros(1, H, 40, D)
    q[..., 2] = 3.0
    options = lane(select("d2o", hh=0.025, recent=0.0, sink=0, whole=False))
    (key, value, _), index = thinned(options, k, v, q)
    assert index.flatten().tolist() == [10] * K
    assert float((value[0, 0, 0] - v[0, 0, 10]).norm()) > 0.1
    other = v.clone()
    other[:, :, 30] = 1e6  # the most unlike of all
    again = thinned(lane(select("d2o", hh=0.025, recent=0.0, sink=0, whole=False)), k, other, q)[0]
    same(again[1], value)
    same(again[0], key)


def test_sizes_hold_while_decoding() -> None:
    model, ids = models.shared("llama"), random_ids(1, 60, seed=4)
    cache = SegmentCache(model, made(hh=0.3, recent=0.1))
    feed(model, cache, ids[:, :40], [40])
    cache.finish()
    sizes = cache.entries()
    assert sizes.unique(dim=1).shape[1] == 1  # the heads of a layer hold alike
    assert abs(float(sizes.double().mean()) - 16) <= 0.5
    feed(model, cache, ids[:, 40:], [1] * 20)
    same(cache.entries(), sizes)


def test_layers_that_stay_whole_keep_what_is_decoded() -> None:
    model = models.shared("llama")
    cache = SegmentCache(model, made(hh=0.1, recent=0.1, whole=True))
    feed(model, cache, random_ids(1, 50, seed=4), [40, *[1] * 10])
    assert cache.entries().unique().tolist() == [50]  # three layers: the first two and the last


def test_calibrated_shares_meet_the_budget_and_do_not_depend_on_the_prompt() -> None:
    plan = made(hh=0.2, recent=0.2, mode="calibrated", samples=2, tokens=80)
    shares = plan.evidence["layer_ratio"]
    assert abs(float(shares.mean()) - 0.4) < 0.02
    assert float(shares.std()) > 0.01
    assert plan.keep is not None
    assert plan.keep.select is not None
    assert not plan.keep.select.ragged
    assert plan.keep.select.settings["newest"] == 0.5
    close(plan.keep.select.budget, shares[:, None].expand(-1, 2))


def test_without_merging_the_same_entries_stay() -> None:
    model, ids = models.shared("llama"), random_ids(1, 40, seed=5)
    caches = [SegmentCache(model, made(hh=0.2, recent=0.2, merge=merge)) for merge in (True, False)]
    for cache in caches:
        feed(model, cache, ids, [40])
        cache.finish()
    same(caches[0].entries(), caches[1].entries())
    for layers in zip(*(cache.segments for cache in caches), strict=True):
        mine, theirs = (next(layer.lanes()).recall()[1] for layer in layers)
        assert bool((mine == theirs).all(-1).any())  # what took nothing in
        assert not bool((mine == theirs).all())


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.8, 0.3), (-0.1, 0.3)])
def test_bad_shares_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="hh or recent"):
        made(hh=shares[0], recent=shares[1])
