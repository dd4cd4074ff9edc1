"""Known answers of Double Sparsity, cards B15 and C5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import trace
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, error, same

IDS, CHUNKS = random_ids(1, 60, seed=3), [50, *[1] * 10]
BUSY = (1, 5)  # a pair of channels that RoPE turns together


def narrow() -> Model:
    """Keys are zero but for one pair of channels."""
    model = models.build("llama")
    for layer in model.network.model.layers:
        weight = layer.self_attn.k_proj.weight.unflatten(0, (model.geometry.kv_heads, -1))
        weight[:, [c for c in range(model.geometry.head_dim) if c not in BUSY]] = 0.0
    model.network.double()
    return model


def made(model: Model, **settings: object) -> Plan:
    options = dict(budget=4, dense=0, recent=1, bits=0, channels=2) | settings
    return calibrate("double-sparsity", options, model=model, trace=trace(model, ("products",)))


@pytest.mark.parametrize("rank", ["k", "qk", "pair"])
def test_the_channels_that_carry_everything_choose_as_all_would(rank: str) -> None:
    model = narrow()
    plan = made(model, rank=rank)
    assert plan.read is not None
    assert plan.read.table is not None
    assert bool((plan.read.table[..., :2].sort(-1).values == torch.tensor(BUSY)).all())
    every = torch.arange(model.geometry.head_dim)
    assert bool((plan.read.table.sort(-1).values == every).all())
    exact = replace(plan, read=replace(plan.read, summary="keys", table=None, rank=0))
    logits = [feed(model, SegmentCache(model, each), IDS, CHUNKS) for each in (plan, exact)]
    close(*logits)
    wrong = replace(plan, read=replace(plan.read, table=plan.read.table.flip(-1)))
    assert error(feed(model, SegmentCache(model, wrong), IDS, CHUNKS), logits[1]) > 1e-2


def test_the_order_of_other_channels_does_not_matter() -> None:
    model = models.double("llama")
    plan = made(model, channels=3)
    assert plan.read is not None
    assert plan.read.table is not None
    table = torch.cat([plan.read.table[..., :3], plan.read.table[..., 3:].flip(-1)], -1)
    other = replace(plan, read=replace(plan.read, table=table))
    same(*(feed(model, SegmentCache(model, each), IDS, CHUNKS) for each in (plan, other)))


@pytest.mark.parametrize(("bits", "size"), [(0, 8 * 4), (8, 8 + 4), (4, 4 + 4), (2, 2 + 4)])
def test_bytes_of_labels(bits: int, size: int) -> None:
    """r · bits / 8 bytes of codes, a scale and a zero of 16 bits, per entry of the bulk and KV head."""
    model = models.shared("llama")
    cache = SegmentCache(model, made(model, channels=8, bits=bits))
    feed(model, cache, IDS, CHUNKS)
    (lane,) = cache.segments[1].lanes()
    assert sum(part.nbytes for part in lane.reader.units.parts) == size * lane.bulk.length * model.geometry.kv_heads
    assert lane.bulk.length == 59


def test_labels_that_cannot_be() -> None:
    model = models.shared("llama")
    with pytest.raises(InputError, match="more labels than channels"):
        made(model, channels=9)
    with pytest.raises(InputError, match="packed by eights"):
        made(model, channels=3, bits=4)
