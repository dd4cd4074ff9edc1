"""Known answers of merging KV heads by SVD, card B18."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Join, Linear
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Store
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

IDS = random_ids(1, 44, seed=4)
CHUNKS = [36, *[1] * 8]


def merged(model: Model, **settings: object) -> Plan:
    return calibrate(
        "kv-heads", {"block": 8, **settings}, model=with_tokenizer(model), trace=observed(model, ("gram",))
    )


def logits(model: Model, plan: Plan) -> torch.Tensor:
    return feed(model, SegmentCache(model, plan), IDS, CHUNKS)


def pooled(model: Model) -> Plan:
    """Mean pooling: z = (k₁ + k₂)/2 stands for both heads."""
    g = model.geometry
    pool = Linear(torch.eye(8).repeat(2, 1)[None] / 2, torch.eye(8).repeat(1, 2)[None])
    keys, values = (Encoding(transforms=(Join(2), pool), rotated=rotated) for rotated in (False, True))
    store = Store((keys,), (values,), torch.zeros(g.layers, g.kv_heads, dtype=torch.int32), block=8)
    return Plan("pooled", model.fingerprint, store=store)


def twins(turned: bool) -> Model:
    """The second head's keys and values are the first's, or the first's turned by an orthogonal matrix."""
    model = models.build("llama")
    for module in model.attention_modules:
        for side in "kv":
            weight = getattr(module, f"{side}_proj").weight.data
            turn = torch.linalg.qr(torch.randn(8, 8))[0] if turned else torch.eye(8)
            weight[8:] = turn @ weight[:8]
    return model


def test_heads_that_differ_by_a_rotation_merge_without_loss_and_a_mean_loses() -> None:
    model = twins(turned=True)
    made, expected = merged(model, heads=2), own(model, IDS)
    close(logits(model, made), expected)
    close(made.evidence["key_dropped"], torch.zeros(3, 1))
    assert float((logits(model, pooled(model)) - expected).abs().max()) > 0.1


def test_equal_heads_merge_without_loss_either_way() -> None:
    model = twins(turned=False)
    expected = own(model, IDS)
    close(logits(model, merged(model, heads=2)), expected)
    close(logits(model, pooled(model)), expected)


def test_no_merging_is_exact(llama: Model) -> None:
    assert merged(llama, heads=1).store.lossless
    close(logits(llama, merged(llama, heads=1)), own(llama, IDS))


def test_merging_never_drops_more_than_a_mean(llama: Model) -> None:
    views = _training.states(llama, Sample(random_ids(1, 80, seed=11)[0], "text"))
    ours, mean = merged(llama, heads=2), pooled(llama)
    for layer, view in enumerate(views):
        pairs = ((view.k_pre[None], ours.store.keys[layer], mean.store.keys[0]),
                 (view.v[None], ours.store.values[layer], mean.store.values[0]))  # fmt: skip
        for x, svd, pool in pairs:
            errors = [float((e.decode(e.encode(x), 8) - x).square().sum()) for e in (svd, pool)]
            assert errors[0] < errors[1]


def test_fewer_heads_drop_more_and_take_their_share_of_bytes() -> None:
    model = models.shared("mha")
    dropped, held = [], []
    for heads in (1, 2, 3, 6):
        made = merged(model, heads=heads)
        dropped.append(float(made.evidence["key_dropped"].mean() + made.evidence["value_dropped"].mean()))
        cache = SegmentCache(model, made)
        feed(model, cache, random_ids(1, 64, seed=1), [64])
        held.append(sum(lane.read_bytes() for layer in cache.segments for lane in layer.lanes()))
    assert all(less < more for less, more in itertools.pairwise(dropped))
    assert [held[0] / count for count in held] == [1, 2, 3, 6]


def test_the_next_number_that_divides() -> None:
    assert merged(models.shared("mha"), heads=4).provenance["facts"]["heads"] == 6
    assert merged(models.shared("llama"), heads=5).provenance["facts"]["heads"] == 2
    with pytest.raises(InputError, match="one KV head"):
        merged(models.shared("mqa"), heads=2)
