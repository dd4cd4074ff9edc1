"""Known answers of TidalDecode, card C1."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods.tidal import selectors
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import trace
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error

IDS, CHUNKS = random_ids(1, 60, seed=4), [50, *[1] * 10]


def published(model: Model, **settings: object) -> Plan:
    return calibrate("tidal", dict(mode="published", budget=3, recent=1, dense=0) | settings, model=model)


def run(model: Model, plan: Plan) -> torch.Tensor:
    return feed(model, SegmentCache(model, plan), IDS, CHUNKS)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_other_layers_hold_more(count: int) -> None:
    """Dynamic programming against all sets of layers."""
    free = [1, 2, 4, 5, 6, 7]
    mass = torch.rand(8, 8, generator=torch.Generator().manual_seed(count)).double()

    def held(chosen: tuple[int, ...]) -> float:
        others = [layer for layer in free if layer not in chosen]
        return len(chosen) + sum(float(mass[max(s for s in chosen if s < layer), layer]) for layer in others)

    every = [(1, *rest) for rest in combinations(free[1:], count - 1)]
    found = selectors(mass, free, count)
    assert tuple(found) in every
    assert held(tuple(found)) == max(held(chosen) for chosen in every)


def test_a_layer_that_changes_its_mind_is_found() -> None:
    """Two runs of layers that agree within and not across: the second one's first layer chooses, too."""
    mass = torch.zeros(9, 9)
    mass[:5, :5], mass[5:, 5:] = 0.9, 0.9
    assert selectors(mass, list(range(1, 9)), 2) == [1, 5]


def test_layers_that_all_choose_are_dense() -> None:
    model = models.double("llama")
    plan = calibrate("tidal", dict(selectors=3, dense=0, budget=2), model=model, trace=trace(model, ("layer-overlap",)))
    assert plan.provenance["facts"]["selectors"] == [0, 1, 2]
    close(run(model, plan), own(model, IDS))


def test_layers_that_are_alike_agree() -> None:
    """Three layers of equal queries and keys, no output between them: each layer's choice is every other's."""
    model = models.build("llama")
    layers = model.network.model.layers
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    seen = trace(model, ("layer-overlap",))["layer-overlap"]
    overlap, mass = (seen[name] / seen["rows"] for name in ("overlap", "mass"))
    close(overlap, torch.ones(3, 3).triu().double())
    close(mass, mass[0, 0].expand(3, 3).triu())


def test_a_layer_between_reads_what_the_selector_chose() -> None:
    """As if it had chosen by the selector's own scores: where layers are alike, that is its own choice."""
    model = models.build("llama")
    layers = model.network.model.layers
    for layer in layers:
        layer.self_attn.q_proj.weight.copy_(layers[0].self_attn.q_proj.weight)
        layer.self_attn.k_proj.weight.copy_(layers[0].self_attn.k_proj.weight)
        layer.input_layernorm.weight.copy_(layers[0].input_layernorm.weight)
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight *= 1e-7  # the stream stays what it was
    layers[-1].self_attn.o_proj.weight *= 1e7
    model.network.double()
    plan = published(model, again=1)
    assert plan.read is not None
    assert plan.read.owner is not None
    assert plan.read.owner.tolist() == [0, 1, 1]
    alone = replace(plan, read=replace(plan.read, owner=None))
    assert error(run(model, plan), own(model, IDS)) > 1e-2
    close(run(model, plan), run(model, alone), torch.float32)


def test_only_layers_that_choose_read_everything() -> None:
    """Bytes: two layers whole, the others `budget` entries and the recent one."""
    model = models.shared("llama")
    cache = SegmentCache(model, published(model, budget=5, again=1))
    feed(model, cache, IDS, CHUNKS)
    entry = 2 * 4 * model.geometry.head_dim * model.geometry.kv_heads
    assert cache.read_bytes == entry * (60 + 60 + 5 + 1)


def test_the_needle_that_a_selector_finds_is_read_by_the_next_layer() -> None:
    """A third layer has the induction head again, the second one's puts out nothing: with two entries to read, copies
    are found by the choice of the second layer, and not by that of the first."""
    model = models.induction_model()
    network = model.network
    network.model.layers.append(copy.deepcopy(network.model.layers[1]))
    network.model.layers[2].self_attn.layer_idx, network.model.layers[2].self_attn.config = 2, network.config
    network.config.num_hidden_layers = 3
    network.model.layers[1].self_attn.o_proj.weight.zero_()
    model = Model(network, None, "induction twice")
    ids = repeated(40, 2)[None]

    def accuracy(plan: Plan) -> float:
        logits = feed(model, SegmentCache(model, plan), ids, [44, *[1] * 36])
        return float((logits[0, 44:-1].argmax(-1) == ids[0, 45:]).float().mean())

    second = published(model, budget=2, recent=0, again=1)
    assert accuracy(second) == 1.0
    assert second.read is not None
    first = replace(second, read=replace(second.read, owner=torch.tensor([0, 1, 0]).int()))
    assert accuracy(first) < 0.5


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(InputError, match="again"):
        published(models.shared("llama"), again=3)
