"""SAQ: bands by age, and bits dealt by where attention goes."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.store.tiers import Tiers
from kvtool.errors import InputError
from kvtool.methods.saq import dealt
from tests import models
from tests.laws.methods import plan
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same

BANDS = dict(group=8, recent=4, block=8)


def test_one_band_is_kivi() -> None:
    model, ids = models.double("llama"), random_ids(1, 60)
    mine = plan("saq", model, BANDS | dict(bits=(2,), edges=(8,)))
    theirs = plan("kivi", model, BANDS | dict(bits=2))
    chunks = [40, *[1] * 20]
    same(feed(model, SegmentCache(model, mine), ids, chunks), feed(model, SegmentCache(model, theirs), ids, chunks))


def test_bits_never_rise_with_age() -> None:
    model = models.double("llama")
    cache = SegmentCache(model, plan("saq", model, BANDS | dict(bits=(8, 4, 2), edges=(8, 16))))
    feed(model, cache, random_ids(1, 100), [100])
    for layer in cache.segments:
        for lane in layer.lanes():
            assert isinstance(lane.bulk, Tiers)  # type: ignore[attr-defined]
            assert [(tier.length, tier.key.codec.bits) for tier in lane.bulk.tiers] == [(8, 8), (16, 4), (72, 2)]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="bad bands"):
        plan("saq", model, dict(bits=(2, 4), edges=(8,)))


def test_a_short_text_is_exact() -> None:
    model, ids = models.double("llama"), random_ids(1, 11)
    cache = SegmentCache(model, plan("saq", model, BANDS | dict(bits=(8, 2), edges=(8,))))
    same(feed(model, cache, ids, [8, 1, 1, 1]), feed(model, SegmentCache(model), ids, [8, 1, 1, 1]))


def test_bits_go_where_the_attention_is() -> None:
    """One layer looks near, one far: at equal bytes the first gets its bits for young tokens, the second for old."""
    mass, spans = torch.tensor([[0.99, 0.01], [0.05, 0.95]]).double(), torch.tensor([128, 128])
    made = dealt(mass, spans, (4, 2))
    assert bool((made[:, 0] >= made[:, 1]).all())
    assert int(made[0, 1]) < int(made[1, 1])
    assert int((made * spans).sum()) <= 2 * 128 * 6
    more = dealt(mass, spans, (8, 8))
    assert more.tolist() == [[8, 8], [8, 8]]


def test_equal_layers_are_dealt_alike() -> None:
    made = dealt(torch.full((4, 2), 0.5).double(), torch.tensor([64, 64]), (3, 3))
    assert made.tolist() == [[3, 3]] * 4
