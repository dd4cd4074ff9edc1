"""Known answers of Eigen Attention, card B20."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods.eigen import output_error, reach
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

IDS = random_ids(1, 44, seed=4)


def eigen(model: Model, **settings: object) -> Plan:
    settings = {"samples": 1, "tokens": 40, **settings}
    return calibrate("eigen", settings, model=with_tokenizer(model), trace=observed(model, ("gram",)))


def test_the_rank_that_reaches_a_share_of_the_energy() -> None:
    energy = torch.tensor([[9.0, 4.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).double()
    for threshold, expected in ((0.5, [1, 2]), (0.6, [1, 3]), (0.61, [2, 3]), (0.9, [3, 4]), (1.0, [4, 4])):
        assert reach(energy, threshold).tolist() == expected
    assert reach(torch.tensor([4.0, 1.0, 0.0, 0.0]).double(), 1.0).tolist() == 2  # more would hold nothing


def test_the_released_count_sums_roots_and_stops_one_short() -> None:
    """Card B30: σ = 3, 2, 1, 1 of 7; what has not yet reached the share is counted, and no more."""
    energy = torch.tensor([9.0, 4.0, 1.0, 1.0]).double()
    for threshold, expected in ((0.42, 1), (0.5, 1), (0.8, 2), (0.9, 3), (1.0, 3)):
        assert reach(energy, threshold, "code").tolist() == expected


def planted(name: str) -> Model:
    """All keys of a layer lie in one plane of three dimensions; each head's values in three of its own."""
    model = models.build(name)
    for module in model.attention_modules:
        plane = torch.linalg.qr(torch.randn(8, 8))[0][:, :3]
        keys, values = (getattr(module, f"{side}_proj").weight.data for side in "kv")
        keys.copy_((plane @ plane.T @ keys.unflatten(0, (-1, 8))).flatten(0, 1))
        own_planes = torch.linalg.qr(torch.randn(model.geometry.kv_heads, 8, 8))[0][..., :3]
        values.copy_((own_planes @ own_planes.transpose(1, 2) @ values.unflatten(0, (-1, 8))).flatten(0, 1))
    return model


@pytest.mark.parametrize("name", ["llama", "rope-yarn"])
def test_data_in_a_subspace_are_exact_at_its_rank(name: str) -> None:
    model = planted(name)
    made = eigen(model, budget=3 / 8, block=8)
    assert made.evidence["ranks"].unique().tolist() == [3]
    close(feed(model, SegmentCache(model, made), IDS, [36, *[1] * 8]), own(model, IDS))
    searched = eigen(model, error=0.0, floor=0.0)
    assert searched.evidence["ranks"].unique().tolist() == [8]  # nothing below an error of 0
    assert eigen(model, error=1e-3, floor=0.0).evidence["ranks"].unique().tolist() == [3]


def test_keys_share_one_basis_and_values_do_not(llama: Model) -> None:
    made = eigen(llama, budget=0.5)
    (key,), (value,) = made.store.keys[0].transforms, made.store.values[0].transforms
    assert len(key.down) == 1
    assert len(value.down) == llama.geometry.kv_heads
    assert not made.store.keys[0].rotated


@functools.cache
def views(name: str) -> list[_training.States]:
    return _training.states(models.shared(name), Sample(random_ids(1, 40, seed=9)[0], "text"))


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3", "gpt-oss"])
def test_the_error_of_a_layers_output(name: str) -> None:
    """Against attention row by row, with sink logits where the model has them; none with whole bases."""
    model = models.shared(name)
    layer = next(at for at, window in enumerate(model.geometry.windows) if window is None)
    view, g = views(name)[layer], model.geometry
    weight = model.output_projection(layer)
    draw = torch.Generator().manual_seed(3)
    keys, values = (torch.linalg.qr(torch.randn(n, 8, 8, generator=draw))[0] for n in (1, g.kv_heads))
    assert output_error(view, keys, values, weight) < 1e-4
    outs = []
    for basis_k, basis_v in ((keys, values), (keys[..., :5], values[..., :4])):
        k = view.rotary.rotate(view.k_pre @ (basis_k @ basis_k.transpose(1, 2)), view.table)
        v = view.v @ (basis_v @ basis_v.transpose(1, 2))
        rows = []
        for row, head in itertools.product(range(40), range(g.query_heads)):
            logits = view.scale * k[head // g.group, : row + 1] @ view.q[head, row]
            if view.sink_logits is not None:
                logits = torch.cat([logits, view.sink_logits[head : head + 1]])
            rows.append(logits.softmax(0)[: row + 1] @ v[head // g.group, : row + 1])
        outs.append(torch.stack(rows).reshape(40, -1) @ weight.T)
    expected = (outs[0] - outs[1]).norm() / outs[0].norm()
    close(torch.tensor(output_error(view, keys[..., :5], values[..., :4], weight)), expected)


def test_the_search_stops_before_what_a_layer_does_not_bear(llama: Model) -> None:
    ranks = []
    for bound in (0.1, 0.3, 0.6, 0.9):
        made = eigen(llama, error=bound, floor=0.0, tokens=60)
        assert bool((made.evidence["error"] < bound).all())
        ranks.append(made.evidence["ranks"].sum(1))
    for more, less in itertools.pairwise(ranks):
        assert bool((less <= more).all())
    assert int(ranks[-1].sum()) < int(ranks[0].sum())
    assert eigen(llama, error=10.0, floor=0.45).evidence["ranks"].unique().tolist() == [4]  # of 8


def test_impossible_options(llama: Model) -> None:
    for settings in (dict(error=-0.1), dict(budget=1.5), dict(floor=2.0), dict(samples=0)):
        with pytest.raises(InputError):
            eigen(llama, **settings)
