"""Known answers of ZipVL, card A27. Means over the queries that see an entry: tests/cache/keep/test_selector.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.budgets._base import covering
from kvtool.cache.lane import Step
from kvtool.cache.read.prefills._base import Job
from kvtool.cache.read.prefills.columns import Rule
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods._training import states
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.rotary import NONE
from tests import models
from tests.cache.keep.test_selector import chosen, selector
from tests.models import random_ids
from tests.running import feed, own
from tests.statistics.naive import written_down
from tests.tolerance import error


def zipvl(model: Model, **settings: object) -> Plan:
    return calibrate("zipvl", {"samples": 2, "tokens": 240, **settings}, model=models.with_tokenizer(model))


def held(model: Model, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    cache = SegmentCache(model, plan)
    feed(model, cache, ids, [ids.shape[1]])
    cache.finish()
    return cache.entries()


def test_the_card() -> None:
    """One-hot on token 0: one entry, whatever τ; uniform causal attention over 8: entries by harmonic sums."""
    one = torch.zeros(8)
    one[0] = 8.0
    assert [covering(one, slice(0, 8), tau) for tau in (0.1, 0.9, 1.0)] == [1, 1, 1]
    uniform = torch.tensor([sum(1 / (i + 1) for i in range(j, 8)) for j in range(8)])
    assert float(uniform.sum()) == pytest.approx(8)
    assert covering(uniform, slice(0, 8), 1.0) == 8
    assert covering(uniform, slice(0, 8), float(uniform[:3].sum() / 8)) == 3


def test_how_many_goes_by_sums_and_which_by_means() -> None:
    """Sums 1.2, .93, .5, .32 over 4, 3, 2 and 1 queries: the first two by sum, the second and the last by mean."""
    sums = torch.tensor([1.2, 0.93, 0.5, 0.32]).expand(1, 2, -1)
    assert chosen(selector(2, pick="best"), sums, 2)[0, 0].tolist() == [0, 1]
    assert chosen(selector(2, pick="per-query"), sums, 2)[0, 0].tolist() == [1, 3]


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9])
def test_every_layer_holds_the_fewest_entries_of_its_share(tau: float) -> None:
    model, ids = models.double("llama"), random_ids(1, 50, seed=4)
    got = held(model, zipvl(model, tau=tau, observe="all"), ids)
    for index, layer in enumerate(written_down(model, ids[0])):
        sums = layer.weights.mean(0).sum(0)
        rest = sums[:-1].sort(descending=True).values  # the newest entry stays anyway
        counts = [1 + k for k in range(50) if float(sums[-1] + rest[:k].sum()) >= tau * float(sums.sum())]
        assert got[index].tolist() == [counts[0]] * model.geometry.kv_heads


def test_a_budget_lowers_tau_for_all_layers_alike() -> None:
    model, ids = models.double("llama"), random_ids(1, 50, seed=4)
    asked, bound = held(model, zipvl(model, tau=0.9), ids), held(model, zipvl(model, tau=0.9, budget=0.3), ids)
    assert int(bound.sum()) == bound.numel() * 15
    assert bool((bound < asked).all())
    same = held(model, zipvl(model, tau=0.05, budget=0.9), ids)  # τ asks for less than the budget
    assert int(same.sum()) < 0.5 * same.numel() * 45


@pytest.mark.parametrize("settings", [{"tau": 0.0}, {"tau": 1.1}, {"budget": -1.0}, {"observe": "some"}])
def test_bad_options(settings: dict[str, object], llama: Model) -> None:
    with pytest.raises(InputError):
        zipvl(llama, **settings)


def test_a_sparse_prefill_reads_what_is_kept() -> None:
    """The first layer's entries depend on tokens alone: what its queries read, by their probes, is what stays."""
    model, ids = models.double("llama"), random_ids(1, 50, seed=4)
    made = zipvl(model, tau=0.7, prefill="sparse", block=8, local=2)
    cache, full = SegmentCache(model, made), SegmentCache(model)
    feed(model, full, ids, [50])
    feed(model, cache, ids, [50])
    layer = cache.segments[0]
    assert layer.sparse is not None
    keys = full.segments[0].parts[0].lanes[0].recall()[0]
    shown = own_queries(model, ids)
    job = Job(layer.sparse.spec, shown, keys, Step(0, model.geometry.head_dim**-0.5), NONE, 0, no_cuts)
    listed = Rule(job).listed
    assert listed is not None
    cache.finish()
    kept = layer.parts[0].lanes[0].recall()[0][0, 0]
    found = (kept[:, None] - keys[0, 0][None]).abs().amax(-1).argmin(1).tolist()
    assert set(listed[0, 0].nonzero().flatten().tolist()) | {49} == set(found)
    assert len(found) < 45


def own_queries(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """The first layer's queries [1,H,T,D]."""
    return states(model, Sample(ids[0], "text"))[0].q[None]


def no_cuts(low: int, first: int, near: int) -> torch.Tensor:
    raise AssertionError("columns are not cut")


def test_prefill_is_dense_unless_told() -> None:
    model = models.double("llama")
    dense, sparse = zipvl(model, tau=0.7), zipvl(model, tau=0.7, prefill="sparse", block=8)
    assert dense.dense
    assert not sparse.dense
    assert zipvl(model, tau=1.0, prefill="sparse").dense
    ids = random_ids(1, 50, seed=4)
    cache = SegmentCache(model, sparse)
    assert error(feed(model, cache, ids, [50]), own(model, ids)) > 1e-2
