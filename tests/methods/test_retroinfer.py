"""Known answers of RetroInfer, card C3b; estimates and k-means themselves are in tests/cache/read/test_reader.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.model import Model
from tests import models
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error

IDS, CHUNKS = random_ids(1, 70, seed=6), [60, *[1] * 10]


def run(model: Model, **settings: object) -> tuple[torch.Tensor, SegmentCache]:
    options = dict(budget=0.2, unit=4, sink=1, recent=2) | settings
    cache = SegmentCache(model, calibrate("retroinfer", options, model=model))
    return feed(model, cache, IDS, CHUNKS), cache


def test_clusters_of_one_are_estimated_exactly() -> None:
    """Where all that is not read is estimated, and every cluster is a single entry, nothing is lost."""
    model = models.double("llama")
    close(run(model, unit=1, estimated=1.0)[0], own(model, IDS), torch.float32)
    assert error(run(model, unit=1, estimated=0.0)[0], own(model, IDS)) > 1e-2


def test_an_estimate_never_exceeds_what_it_stands_for() -> None:
    """The mass that attention finds falls short of the whole, by less if the rest is estimated."""
    model = models.double("llama")
    q, masses = torch.randn(1, 6, 1, 8, generator=torch.Generator().manual_seed(2)).double(), {}
    step = Step(0, model.geometry.head_dim**-0.5)
    for estimated in (0.0, 1.0):
        (lane,) = run(model, estimated=estimated)[1].segments[0].lanes()
        masses[estimated] = lane.reader.attend(q, lane.bulk, step)[1]
    assert bool((masses[0.0] < masses[1.0]).all())
    assert bool((masses[1.0] <= lane.bulk.attend(q, step)[1]).all())


def test_equal_tokens_are_one_cluster() -> None:
    """Without positions in the keys, copies of a token have one key: estimates of them alone are exact."""
    model = models.shallow("llama")
    model.network.model.rotary_emb.inv_freq.zero_()
    model = Model(model.network.double(), None, "no positions")
    ids = torch.tensor([[5, 9, 17, 33]]).repeat_interleave(14, 1)
    ids = torch.cat([ids, ids[:, ::14]], 1)
    plan = calibrate("retroinfer", dict(budget=0.05, unit=14, estimated=1.0, sink=0, recent=0), model=model)
    cache = SegmentCache(model, plan)
    logits = feed(model, cache, ids, [56, *[1] * 4])
    (lane,) = cache.segments[0].lanes()
    assert lane.reader.units.sizes.tolist() == [[[14] * 4] * 2]
    close(logits, own(model, ids), torch.float32)


@pytest.mark.parametrize("slow", [True, False])
def test_only_what_is_chosen_moves(slow: bool) -> None:
    model = models.shared("llama")
    _, cache = run(model, budget=5, slow=slow)
    entry = 2 * 4 * model.geometry.head_dim
    clustering = cache.moved_bytes - 10 * 3 * 2 * 5 * entry  # keys and values are fetched once to be clustered
    assert clustering >= 0 if slow else cache.moved_bytes == 0
    assert (cache.slow_bytes > 0) == slow


def test_the_needle_is_read(induction: Model) -> None:
    """Clusters of three entries on average, one of them to read: the copied entry's."""
    ids = repeated(40, 2)[None]
    options = dict(budget=4, unit=3, estimated=0.0, sink=0, recent=1)
    plan = calibrate("retroinfer", options, model=induction)
    logits = feed(induction, SegmentCache(induction, plan), ids, [44, *[1] * 36])
    assert float((logits[0, 44:-1].argmax(-1) == ids[0, 45:]).float().mean()) > 0.9
