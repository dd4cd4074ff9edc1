"""Known answers of Elastic Cache, card A21; its rules, entry by entry, are in tests/cache/keep/test_merging.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, prompted, random, select
from tests.methods.merging import thinned
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same


def rising(entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys that pay later entries more."""
    k = torch.zeros(1, K, entries, D)
    k[..., 0] = torch.arange(entries)
    q = torch.zeros(1, H, entries, D)
    q[:, :, -1, 0] = 1.0
    return q, k


def test_what_the_paper_keeps() -> None:
    """Scores that rise with position: sinks, the upper half, and the last."""
    q, k = rising(24)
    made = lane(select("elastic", budget=0.5, sink=4))
    made.observe(q[:, :, -1:], 23, k, k, STEP, {})
    view = made.view(k, k, STEP, {})
    scores = made.scores(view)
    index = made.choose(view, scores, 12, scores)
    same(index[0, 0], torch.tensor([*range(4), *range(16, 24)]))


def test_what_the_code_keeps() -> None:
    """Scores that rise with position are where order and ranks are one: only one entry is missing. Elsewhere not."""
    scores = torch.rand(1, 1, 40, generator=torch.Generator().manual_seed(0)).expand(1, K, -1)
    k = random(1, K, 40, D)
    kept = {}
    for mode in ("paper", "code"):
        made = lane(select("elastic", budget=0.5, sink=4, mode=mode))
        made.observe(random(1, H, 40, D), 0, k, k, STEP, {})
        made.prompt_length = 40
        kept[mode] = made.choose(made.view(k, k, STEP, {}), scores, 20, scores)[0, 0].tolist()
    assert len(kept["paper"]) == 20
    assert len(kept["code"]) == 19
    middle = scores[0, 0, 4:39].tolist()
    order = sorted(range(35), key=middle.__getitem__)
    assert kept["code"] == [*range(4), *[4 + i for i in range(35) if order[i] > 20], 39]
    assert kept["paper"] == [*range(4), *sorted(4 + i for i in order[-15:]), 39]
    assert len({*kept["paper"]} & {*kept["code"]}) < 18


def test_one_anchor_with_copies_is_unchanged() -> None:
    k, v = random(1, K, 1, D).expand(-1, -1, 20, -1), random(1, K, 1, D).expand(-1, -1, 20, -1)
    (key, value, counts), _ = thinned(lane(select("elastic", budget=0.3, sink=4)), k, v)
    close(key, k[:, :, :6])
    close(value, v[:, :, :6])
    assert counts[0, 0].tolist() == [1, 1, 1, 1, 15, 1]


@pytest.mark.parametrize("apart", [2, 10, 30])
def test_the_mean_of_two_rotated_copies_shrinks(apart: int) -> None:
    """Card: by cos(f·δ/2) in the channels of angular frequency f, half way between them."""
    model = models.shared("llama")
    rotary, x = model.rotary(0), random(1, 1, 1, D)
    places = torch.tensor([100, 100 + apart])
    mean = rotary.rotate(x.expand(-1, -1, 2, -1), rotary.table(places)).mean(2, keepdim=True)
    half = rotary.table(torch.tensor([apart // 2]))[0]
    close(rotary.unrotate(mean, rotary.table(torch.tensor([100 + apart // 2]))), x * half)
    assert float(half.min()) < 0.99


def test_the_neighbours_of_an_anchor_join_it() -> None:
    """A planted entry that all look at takes in what stands nearer to it than to the other anchor."""
    k, v = torch.zeros(1, K, 30, D), torch.zeros(1, K, 30, D)
    k[:, :, 10, 0], k[:, :, 20, 0] = 5.0, 4.0
    v[..., 0] = torch.arange(30.0)
    q = torch.zeros(1, H, 30, D)
    q[..., 0] = 3.0
    (_, value, counts), index = thinned(lane(select("elastic", budget=7 / 30, sink=4)), k, v, q)
    assert index[0, 1].tolist() == [0, 1, 2, 3, 10, 20, 29]
    assert counts[0, 1].tolist() == [1, 1, 1, 1, 12, 13, 1]
    close(value[0, 1, 4:6, 0], torch.tensor([sum(range(4, 16)) / 12, sum(range(16, 29)) / 13]))


def test_the_budget_grows_and_a_fixed_distance_empties() -> None:
    model, ids = models.shared("llama"), random_ids(1, 90, seed=6)
    plan = calibrate("elastic", dict(budget=0.5, sink=2, distance=5), model=model)
    cache = SegmentCache(model, plan)
    feed(model, cache, ids[:, :40], [40])
    with model.served(), torch.no_grad():
        for at in range(40, 90):
            model.network(input_ids=ids[:, at : at + 1], past_key_values=cache)
            assert cache.entries().unique().tolist() == [round(0.5 * (at + 1))]


def test_the_heads_of_a_layer_keep_alike() -> None:
    made = lane(select("elastic", budget=0.5))
    index = prompted(made, random(1, H, 30, D), random(1, K, 30, D))
    same(index[:, 0], index[:, 1])


def test_a_count_is_no_share() -> None:
    with pytest.raises(InputError, match="budget"):
        select("elastic", budget=64.0)
