"""Known answers of EMS, card A19, as reconstructed; its rules: tests/cache/keep/test_merging.py."""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import Dense
from kvtool.calibrate import calibrate
from kvtool_kernels.ops import attend
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, random, select
from tests.methods.merging import thinned
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, error


def logits(**settings: object) -> torch.Tensor:
    model = models.double("llama")
    plan = calibrate("ems", {"budget": 0.3, "window": 4, **settings}, model=model)
    return feed(model, SegmentCache(model, plan), random_ids(1, 50, seed=1), [40, *[1] * 10])


def test_above_one_everything_goes_to_the_zero_class() -> None:
    dropping = logits(threshold=1.1)
    close(logits(candidates=0.0), dropping)
    assert error(logits(threshold=-1.0), dropping) > 1e-2


def test_below_minus_one_everything_joins() -> None:
    k = random(1, K, 40, D)
    made = lane(select("ems", budget=10, window=2, threshold=-1.0, candidates=4.0))
    (_, _, counts), _ = thinned(made, k, k)
    assert counts.sum(-1).tolist() == [[40.0] * K]


def test_copies_are_lossless_where_they_are_counted() -> None:
    """Without their number, they lose the mass of all but one."""
    times = torch.tensor([1, 2, 3, 4, 5, 9])
    k, v = (random(1, K, 6, D).repeat_interleave(times, 2) for _ in "kv")
    q = random(1, H, 1, D)
    expected = attend(q, k, v, scale=STEP.scale)[0]
    made = lane(select("ems", budget=6, window=1, threshold=0.99, candidates=9.0))
    made.observe(torch.zeros(1, H, 24, D), 0, k, v, STEP, {})
    view = made.view(k, v, STEP, {})
    job = made.job(view, made.scores(view), torch.ones(1, K, 24), (times.cumsum(0) - 1).expand(1, K, -1))
    merged = made.spec.rule("merge").merge(job)
    for count in (True, False):
        held = Dense()
        held.become(*merged, count=count)
        assert (error(held.attend(q, STEP)[0], expected) < 1e-5) == count


def test_the_zero_class_never_contributes() -> None:
    k, v = random(1, K, 40, D), random(1, K, 40, D)
    made = {"budget": 10, "window": 2, "threshold": 0.5, "candidates": 2.0}
    (key, value, counts), index = thinned(lane(select("ems", **made)), k, v)
    kept = index[0, 0].tolist()
    unit = torch.nn.functional.normalize(k[0, 0], dim=-1)
    away = [e for e in range(40) if e not in kept and float((unit[e] @ unit[kept].T).max()) < 0.5]
    assert away
    v[0, 0, away] = 1e30
    (_, again, same_counts), _ = thinned(lane(select("ems", **made)), k, v)
    close(again, value)
    close(same_counts, counts)
    assert float(key.abs().max()) < 10


def test_merged_keys_have_the_norm_of_their_centre() -> None:
    k, v = random(1, K, 40, D), random(1, K, 40, D)
    (key, _, counts), index = thinned(lane(select("ems", budget=8, window=2, threshold=0.0)), k, v)
    assert float(counts.max()) > 1
    close(key.norm(dim=-1), k.norm(dim=-1).gather(2, index))


def test_what_the_whole_prompt_looks_at_and_what_its_end_looks_at_both_stay() -> None:
    """Two planted entries: one that all but the last queries look at, one that only the last ones do."""
    k = 0.01 * random(1, K, 60, D)
    k[:, :, 5, 0], k[:, :, 30, 1] = 6.0, 6.0
    q = torch.zeros(1, H, 60, D)
    q[:, :, :52, 0], q[:, :, 52:, 1] = 4.0, 4.0
    _, index = thinned(lane(select("ems", budget=10, window=8)), k, k, q)
    assert index[0, 0].tolist() == [5, 30, *range(52, 60)]
