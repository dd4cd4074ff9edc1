"""Known answers of ActQKV, card C8; probe and representatives are in tests/cache/read/test_asking.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.board import Board, Place
from kvtool.cache.read.reader import Reader
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import Dense
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods.actqkv import dealt
from tests import models
from tests.laws.methods import observed, plan
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, same

STATISTICS = ("queries", "block-entropy")


def test_layers_that_look_alike_get_alike() -> None:
    close(dealt(torch.full((5,), 0.9), 0.2, 0.7, 2.0, 32), torch.full((5,), 0.2))
    close(dealt(torch.zeros(5), 320, 0.7, 2.0, 32), torch.full((5,), 320.0))


def test_a_layer_gets_its_share_of_what_is_left() -> None:
    """Of 4 · 8 blocks: 1/4 of 32, 2/6 of 24, 3/... no bound is met."""
    close(dealt(torch.tensor([2.0, 1.0, 3.0, 2.0]), 32.0, 0.0, 4.0, 4), torch.tensor([32.0, 16.0, 48.0, 32.0]))


@pytest.mark.parametrize("seed", range(4))
def test_no_more_is_dealt_than_there_is(seed: int) -> None:
    entropy = 0.9 + 0.1 * torch.rand(12, generator=torch.Generator().manual_seed(seed))
    found = dealt(entropy, 0.2, 0.5, 2.0, 32)
    assert float(found.sum()) <= 12 * 0.2 + 1e-6
    assert bool((found.diff()[entropy.diff() > 0.05] > 0).all())  # what looks at more gets more


def test_bounds_of_a_layers_budget() -> None:
    found = dealt(torch.tensor([9.0, 0.1, 1.0]), 0.3, 0.5, 2.0, 32)
    close(found[:2], torch.tensor([0.6, 0.15]))
    same(dealt(torch.tensor([9.0, 0.1, 1.0]), 1.0, 0.5, 2.0, 32), torch.ones(3))


def test_what_is_usual_comes_from_the_trace() -> None:
    model = models.shared("llama")
    trace, g = observed(model, STATISTICS), model.geometry
    read = calibrate("actqkv", {}, model=model, trace=trace).read
    assert read is not None
    assert read.usual is not None
    count, seen = trace["queries"]["tokens"], trace["queries"]
    mean = (seen["sum"] / count).reshape(g.layers, g.kv_heads, g.group, g.head_dim)
    close(read.usual[:, :, :, 0], mean.float())
    second = torch.stack([seen["square"][..., c, c] for c in range(g.head_dim)], -1) / count
    close(read.usual[:, :, :, 1] + read.usual[:, :, :, 0].square(), second.reshape(mean.shape).float())


def test_even_layers_get_the_mean() -> None:
    model = models.shared("llama")
    made = calibrate("actqkv", dict(budget=0.2, dense=1), model=model, trace=observed(model, STATISTICS))
    assert made.read is not None
    assert made.read.budget[0] == 1.0
    assert float(made.read.budget[1:].sum()) <= 0.4 + 1e-6
    close(made.evidence["entropy"] / 1.0, made.evidence["entropy"].clamp(0, 1))


@pytest.mark.parametrize(("asked", "block"), [(6, 3), (1, 0)])
def test_an_unusual_query_chooses(asked: int, block: int) -> None:
    """Planted: of many queries along channel 0 one among the last six is along channel 3, and block 3 is read; by the
    newest alone, or by the mean, it would be block 0."""
    made = plan("actqkv", models.shared("llama"), dict(budget=4, unit=4, keys=4, asked=asked, mode="prompt", recent=4))
    assert made.read is not None
    reader = Reader(replace(made.read, budget=torch.tensor([4.0])), Place(0, 0, (0, 1), Board()))
    k = torch.eye(8).repeat_interleave(4, 0).expand(1, 2, -1, -1).contiguous()
    q = torch.eye(8)[[0] * 28 + [3, 0, 0, 0]].expand(1, 6, -1, -1)
    bulk = Dense()
    reader.receive(q, k, Step(0, 1.0), k)
    reader.append(k, k)
    bulk.append(k, k)
    reader.attend(q[:, :, -1:], bulk, Step(32, 1.0))
    assert reader.choice is not None
    assert reader.choice.flatten().tolist() == [block] * 2


def test_caches_and_layers_do_not_share_what_they_have_seen() -> None:
    """The released code's statistics are of all layers and requests together."""
    model = models.double("llama")
    made = plan("actqkv", model, dict(budget=8, unit=4, asked=4, mode="prompt", sink=1, recent=4))
    ids, outs = random_ids(1, 40, seed=3), []
    for other in (None, random_ids(1, 60, seed=9)):
        cache, beside = SegmentCache(model, made), SegmentCache(model, made)
        logits = [feed(model, cache, ids[:, :30], [30])]
        if other is not None:
            feed(model, beside, other, [50, *[1] * 10])
        logits.append(feed(model, cache, ids[:, 30:], [1] * 10, shift=30))
        outs.append(torch.cat(logits, 1))
    same(outs[0], outs[1])
    totals = [next(layer.lanes()).reader.asking.total for layer in cache.segments]
    assert not torch.equal(totals[0], totals[1])


def test_few_blocks_are_all_read() -> None:
    model = models.shared("llama")
    ids = random_ids(1, 40, seed=5)
    made = plan("actqkv", model, dict(budget=64, unit=4, mode="prompt", sink=1, recent=4))
    close(feed(model, SegmentCache(model, made), ids, [30, *[1] * 10]), own(model, ids))


def test_bad_options() -> None:
    for settings in (dict(least=1.5), dict(most=0.5), dict(budget=0.0)):
        with pytest.raises(InputError, match="bad option"):
            calibrate("actqkv", dict(mode="prompt", **settings), model=models.shared("llama"))
