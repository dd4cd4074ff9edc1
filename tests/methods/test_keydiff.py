"""KeyDiff's planted case: keys unlike the mean stay, and no query is needed."""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from tests import models
from tests.methods.evicting import D, H, K, lane, prompted, random, select
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same


def test_unlike_keys_stay() -> None:
    made = lane(select("keydiff", budget=3))
    k = torch.ones(1, K, 30, D) + 0.01 * random(1, K, 30, D)
    k[:, 0, [4, 11, 12]] *= -1.0
    k[:, 1, [0, 6, 29]] *= torch.tensor([1.0, -1.0] * 4)
    for q in (torch.zeros(1, H, 30, D), random(1, H, 30, D)):
        kept = prompted(lane(made.spec), q, k)
        same(kept[0], torch.tensor([[4, 11, 12], [0, 6, 29]]))


def test_prefill_stays_within_the_budget_and_a_chunk() -> None:
    model = models.shared("llama")
    plan = calibrate("keydiff", dict(budget=8, when="chunk"), model=model)
    cache, ids = SegmentCache(model, plan), random_ids(1, 60, seed=6)
    with model.served(), torch.no_grad():
        for low in range(0, 60, 12):
            model.network(input_ids=ids[:, low : low + 12], past_key_values=cache)
            assert (cache.entries() == 8).all()
    feed(model, cache, ids[:, :3], [1, 1, 1])
    assert (cache.entries() == 11).all()
