"""ZipCache: normalised saliency, classes, and values that are separable by channel."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.scores._base import View, reduced
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Root
from kvtool.errors import InputError
from kvtool.rotary import NONE
from kvtool.slots import Select
from tests import models
from tests.laws.methods import plan
from tests.methods.coding import bits, entries
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close


def saliency(p: torch.Tensor) -> torch.Tensor:
    """Of attention p [T,S] of all queries."""
    spec = plan("zipcache", models.shared("llama"), {}).keep.select  # type: ignore[union-attr]
    assert isinstance(spec, Select)
    tokens = p.shape[1]
    view = View(
        torch.zeros(1, 1, tokens, 4), torch.arange(tokens), torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4),
        1.0, None, spec, 0, [0], 0, {}, NONE,
    )  # fmt: skip
    return reduced(view, iter([p[None, None]]))[0, 0]


def test_equal_attention_scores_alike_wherever_it_stands() -> None:
    """If every query that sees entry j pays it a_j, its score is a_j."""
    a = torch.rand(50, generator=torch.Generator().manual_seed(0))
    close(saliency(a.expand(50, -1).tril()), a)


def test_the_bias_towards_early_entries_shrinks() -> None:
    """Uniform causal attention over 100: raw sums 519 times apart, normalised ones 5 times."""
    p = torch.ones(100, 100).tril() / torch.arange(1, 101)[:, None]
    raw, normalised = p.sum(0), saliency(p)
    assert float(raw[0] / raw[99]) == pytest.approx(519, rel=0.01)
    assert float(normalised[0] / normalised[99]) == pytest.approx(5.19, rel=0.01)


def test_classes_hold_their_shares() -> None:
    model = models.double("llama")
    cache = SegmentCache(model, plan("zipcache", model, {"salient": 0.6, "block": 10}))
    feed(model, cache, random_ids(1, 50), [50])
    cache.finish()
    for layer in cache.segments:
        for lane in layer.lanes():
            assert isinstance(lane, Thinned)
            assert lane.rest is not None
            assert (lane.bulk.length, lane.recent.length, lane.rest.length) == (30, 0, 20)
    feed(model, cache, random_ids(1, 13, seed=1), [1] * 13)
    assert {(lane.bulk.length, lane.recent.length) for layer in cache.segments for lane in layer.lanes()} == {(40, 3)}  # type: ignore[attr-defined]


def test_values_with_an_outlier_channel_need_no_groups() -> None:
    v = entries(1, 2, 64, 16)
    v[..., 5] *= 40
    plain = Encoding(Affine(4, 16, "channel"))
    separable = Encoding(Affine(4, 16, "channel"), (Root(),)).fitted(v, None)
    others = [c for c in range(16) if c != 5]
    errors = [float((e.decode(e.encode(v), 16) - v)[..., others].square().mean()) for e in (separable, plain)]
    assert errors[0] < errors[1] / 4


def test_what_lies_beyond_the_prompts_range_is_clamped() -> None:
    (key,) = plan("zipcache", models.shared("llama"), {"high": 4}).store.keys  # type: ignore[union-attr]
    k = entries(1, 2, 40, 8)
    made = key.fitted(k, None)
    later = made.decode(made.encode(5 * k), 8)
    assert float(later.max()) <= float(k.max()) + 1e-3


def test_bits_held() -> None:
    """b bits and, for a value's range, 32 a head and token; the channels' own ranges are held once."""
    store = plan("zipcache", models.shared("llama"), {}).store
    assert store is not None
    made = store.keys[0].fitted(entries(1, 2, 40, 8), None)
    assert bits(made, 2, 8) == 4
    assert bits(Encoding(Affine(4, 8, "channel")), 2, 8) == 4 + 32 / 8


def test_bad_bits_are_refused() -> None:
    with pytest.raises(InputError, match="bad bits"):
        plan("zipcache", models.shared("llama"), {"high": 2, "low": 3})
