"""Known answers of Ada-KV, card A10; its arithmetic of counts is in tests/cache/keep/test_selector.py."""

from __future__ import annotations

import torch

from kvtool.cache.keep.budgets._base import Ballot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.slots import Keep
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, random, select
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same


def test_a_head_that_looks_around_takes_from_one_that_stares() -> None:
    """The heads of KV head 0 attend to one entry, those of KV head 1 to all alike."""
    made = lane(select("adakv", budget=0.25, window=2, kernel=1, floor=0.0))
    k = torch.zeros(1, K, 40, D)
    k[:, 0, 7] = 10.0
    q = torch.ones(1, H, 40, D)
    made.observe(q, 0, k, k, STEP, {})
    view = made.view(k, k, STEP, {})
    scores = made.scores(view)
    ballots = [Ballot(view, scores[:, head : head + 1], [10], made.free(40)) for head in range(K)]
    assert made.spec.rule("spread").deal(ballots) == [[3], [17]]
    same(made.choose(view, scores, 3, scores)[0, 0], torch.tensor([7, 38, 39]))


def test_alike_heads_keep_alike() -> None:
    made = lane(select("adakv", budget=0.5, window=2, kernel=3))
    k = random(1, 1, 30, D).expand(-1, K, -1, -1)
    q = random(1, 1, 30, D).expand(-1, H, -1, -1)
    made.observe(q, 0, k, k, STEP, {})
    view = made.view(k, k, STEP, {})
    scores = made.scores(view)
    ballots = [Ballot(view, scores[:, head : head + 1], [15], made.free(30)) for head in range(K)]
    counts = [limit[0] for limit in made.spec.rule("spread").deal(ballots)]
    assert all(13 <= count <= 16 for count in counts)  # ties and rounding


def test_frozen_shares_sum_to_the_budget_and_make_a_rectangular_batch() -> None:
    model = models.with_tokenizer(models.shared("llama"))
    settings = dict(budget=0.3, window=2, kernel=3, mode="calibrated", samples=2, tokens=50)
    plan = calibrate("adakv", settings, model=model)
    keep = plan.keep
    assert isinstance(keep, Keep)
    assert keep.select is not None
    shares = keep.select.budget
    assert ((shares.mean(1) - 0.3).abs() < 2 / 50).all()
    assert float(shares.std()) > 0.01
    assert not keep.select.ragged
    cache = SegmentCache(model, plan)
    feed(model, cache, random_ids(2, 80, seed=2), [80])
    cache.finish()
    assert len(cache.segments[0].parts) == 1
    assert ((cache.entries() - 80 * shares).abs() <= 1).all()
