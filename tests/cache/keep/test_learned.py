"""Scores that a network reads off a token's own query, key and value."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.scores.learned import score
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Select, Store
from tests import models
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same

UNITS = 5


def networks(model: Model) -> dict[str, torch.Tensor]:
    g = model.geometry
    width = (g.query_heads + 2 * g.kv_heads) * g.head_dim
    draw = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(g.layers, UNITS, width, generator=draw) / width**0.5,
        "score": torch.randn(g.layers, g.kv_heads, UNITS, generator=draw),
    }


def learned(model: Model, **options: object) -> Plan:
    g = model.geometry
    select = Select(torch.full((g.layers, g.kv_heads), 8.0), score="learned", tables=networks(model), **options)
    everything = torch.ones(g.layers, g.kv_heads)
    return Plan("learned", model.fingerprint, keep=Keep.heads(everything, sink=0, recent=1, select=select))


def by_hand(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """[K,T] of layer 0: token by token, from what the projections themselves put out, which no rotation has touched."""
    seen: dict[str, torch.Tensor] = {}
    attention = model.network.model.layers[0].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        model.network(input_ids=ids)
    for hook in hooks:
        hook.remove()
    tables = {name: table[0].double() for name, table in networks(model).items()}
    scores = []
    for token in range(ids.shape[1]):
        x = torch.cat([seen[name][token] for name in ("q_proj", "k_proj", "v_proj")])
        inner = tables["hidden"] @ x
        scores.append(tables["score"] @ (inner * torch.sigmoid(inner)))
    return torch.stack(scores, dim=1)


@pytest.mark.parametrize("shift", [0, 37])
@pytest.mark.parametrize("chunks", [[30], [12, 11, 7]], ids=str)
def test_the_best_by_the_networks_stay_however_the_prompt_is_cut(chunks: list[int], shift: int) -> None:
    """A score that never changes makes eviction after every chunk the same as eviction at the end."""
    model, ids = models.double("llama"), random_ids(1, 30, seed=5)
    scores = by_hand(model, ids)
    for when in ("prefill", "chunk"):
        cache = SegmentCache(model, learned(model, when=when))
        feed(model, cache, ids, chunks, shift=shift)
        cache.finish()
        full = SegmentCache(model)
        feed(model, full, ids, [30], shift=shift)
        k = next(full.segments[0].lanes()).recall()[0]
        (lane,) = cache.segments[0].lanes()
        for head in range(2):
            best = scores[head].topk(8).indices.sort().values
            close(lane.recall()[0][0, head], k[0, head, best], torch.float32)


def test_permuting_tokens_permutes_scores() -> None:
    """Card Locret: no token sees another one, nor its own place."""
    model = models.shared("llama")
    q, k, v = torch.randn(1, 6, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    spec, rotary = learned(model).keep.select, model.rotary(1)

    def scores(order: torch.Tensor) -> torch.Tensor:
        table = rotary.table(torch.arange(20))
        turned = [rotary.rotate(x[:, :, order], table) for x in (q, k)]
        tags = {"positions": torch.arange(20).expand(1, 2, -1)}
        view = View(turned[0], torch.arange(20), turned[1], v[:, :, order], 1.0, None, spec, 1, [0, 1], 0, tags, rotary)
        return score(view)

    order = torch.randperm(20)
    close(scores(order), scores(torch.arange(20))[:, :, order])


def test_heads_that_are_kept_apart_are_refused() -> None:
    model = models.shared("llama")
    store = Store(
        (Encoding(), Encoding()), (Encoding(), Encoding()), torch.tensor([[0, 1]] * 3).int(), recent=2, block=2
    )
    cache = SegmentCache(model, replace(learned(model), store=store))
    with pytest.raises(InputError, match="all heads of a layer"):
        feed(model, cache, random_ids(1, 20), [20])


def test_scores_are_held_and_given_back() -> None:
    model, ids = models.shared("llama"), random_ids(2, 24)
    cache = SegmentCache(model, learned(model))
    feed(model, cache, ids, [24])
    held = cache.nbytes
    cache.finish()
    assert cache.nbytes < held
    assert all(lane.selector.running is None for lane in cache.segments[0].lanes())
    same(cache.entries(), torch.full((3, 2), 8))
