"""What a prompt's queries read, against its definition, and the laws of sparse prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool import plan as plans
from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import read
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.replay.subject import Subject
from kvtool.slots import EVERYTHING, Keep, Prefill, Read, Select
from tests import models
from tests.cache.read.prefilling import ALONE, BASE, CASES, LABELS, D, G, K, N, draw, masked, sparse, weights
from tests.laws.methods import ragged
from tests.laws.stores import stored
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.tolerance import close, error, same


@pytest.mark.parametrize(
    ("lanes", "count"), [([[0, 1]], 4), ([[1], [0]], 13)], ids=["one lane, few", "two lanes, more"]
)
@pytest.mark.parametrize("name", CASES)
def test_the_definition(name: str, count: int, lanes: list[list[int]]) -> None:
    spec = Prefill(torch.tensor([float(count)]), **BASE | CASES[name])
    q, k, v = 2 * draw(2, K * G, N, D), draw(2, K, N, D, seed=1), draw(2, K, N, D, seed=2)
    made = sparse(q, k, v, spec, lanes)
    expected = torch.stack([masked(spec, q[row], k[row], v[row], count) for row in range(2)])
    close(made, expected)
    dense = torch.stack([weights(q[r], k[r]) @ v[r].repeat_interleave(G, 0) for r in range(2)])
    assert error(made, dense) > 0.1  # or this test could not fail


# laws


def planned(model: Model, budget: float = 6.0, **options: Any) -> Plan:
    leader = next((layer for layer, window in enumerate(model.geometry.windows) if window is None), 0)
    budgets = torch.full((model.geometry.layers,), budget)
    budgets[:leader] = 1.0
    made = Prefill(budgets, **BASE | dict(leader=leader) | options)
    return Plan("sparse", model.fingerprint, read=Read(torch.ones(len(budgets)), unit=1, prefill=made))


def fed(model: Model, made: Plan, ids: torch.Tensor, chunks: list[int], **options: Any) -> torch.Tensor:
    return feed(model, SegmentCache(model, made, **options), ids, chunks)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mass"])
def test_a_budget_of_everything_is_dense(name: str) -> None:
    model, ids = models.shared("llama"), random_ids(2, 40, seed=1)
    close(fed(model, planned(model, 1e6, **CASES[name]), ids, [19, 17, 1, 1, 2]), own(model, ids))


def test_a_budget_of_everything_is_dense_anywhere(any_model: Model) -> None:
    ids = random_ids(2, 40, seed=1)
    close(fed(any_model, planned(any_model, 1e6), ids, [19, 17, 1, 1, 2]), own(any_model, ids))


@pytest.mark.parametrize("name", ["pages", "labels", "mass"])
def test_decode_reads_everything(name: str) -> None:
    """Steps after the prompt are the full cache's on what the prompt left: here on entries of a dense prompt."""
    model, ids = models.double("llama"), random_ids(1, 40, seed=1)
    made = planned(model, **CASES[name])
    close(fed(model, made, ids, [1] * 40), own(model, ids))
    close(fed(model, made, ids, [30, *[1] * 10], protocol="strict"), own(model, ids))
    assert error(fed(model, made, ids, [30, *[1] * 10]), own(model, ids)) > 1e-2


@pytest.mark.parametrize("name", ALONE)
def test_chunks_that_end_with_blocks(name: str) -> None:
    """They are the prompt at once, if its length is known; other cuts are not."""
    model, ids = models.double("llama"), random_ids(2, 45, seed=1)
    for budget in (6.0, 0.3):
        made = planned(model, budget, **CASES[name])
        whole = fed(model, made, ids, [40, *[1] * 5], prompt_length=40)
        for chunks in ([8, 24, 8], [16, 16, 8]):
            close(fed(model, made, ids, [*chunks, *[1] * 5], prompt_length=40), whole)
        assert error(fed(model, made, ids, [11, 9, 20, *[1] * 5], prompt_length=40), whole) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_whoever_chunks_prompts_feeds_these_at_once(name: str) -> None:
    """Most rules look at the prompt's last queries, or at some from all of it: no chunk knows what to read. Under the
    protocol strict nothing is chosen, and chunks are chunks."""
    model, ids = models.double("llama"), random_ids(2, 45, seed=1)
    made = planned(model, **CASES[name])
    expected = fed(model, made, ids, [40, *[1] * 5], prompt_length=40)[:, 40:]
    caches = []
    for chunk in (0, 8, 11):
        subject = Subject(model, made, chunk=chunk)
        cache = subject.cache("plan", 40)
        subject.prefill(cache, ids[:, :40])
        close(feed(model, cache, ids[:, 40:], [1] * 5, shift=40), expected)
        caches.append(read(model, SegmentCache(model, made, prompt_length=40), ids[0, :40], chunk))
    close(*(feed(model, cache, ids[:1, 40:], [1] * 5, shift=40) for cache in (caches[0], caches[2])))
    assert not SegmentCache(model, made, protocol="strict").at_once
    assert not SegmentCache(model, planned(model, 1.0)).at_once


@pytest.mark.parametrize(("name", "length"), [*((name, None) for name in CASES), ("pages", 40), ("labels", 40)])
def test_padding(name: str, length: int | None) -> None:
    model = models.double("llama")
    made, rows = planned(model, **CASES[name]), [random_ids(1, 42 - at, seed=at)[0] for at in (0, 0, 7, 30)]
    ids, mask = left_padded(rows)
    together = feed(model, SegmentCache(model, made, prompt_length=length), ids, [40, 1, 1], mask=mask)
    for index, row in enumerate(rows):
        prompt = len(row) - 2
        alone = fed(model, made, row[None], [prompt, 1, 1], prompt_length=None if length is None else prompt)
        close(together[index, -len(row) :], alone[0])


def test_layers_with_a_window_of_their_own_read_it() -> None:
    """With no budget for others the model's own windows are all that is left of it."""
    model, ids = models.double("gemma3"), random_ids(1, 40, seed=1)
    windowed = [layer for layer, window in enumerate(model.geometry.windows) if window is not None]
    for budget in (1.0, 3.0):
        budgets = torch.ones(model.geometry.layers)
        budgets[windowed] = budget
        read = Read(torch.ones(len(budgets)), unit=1, prefill=Prefill(budgets, block=8, local=0, dense=0))
        close(fed(model, Plan("windows", model.fingerprint, read=read), ids, [40]), own(model, ids))


def test_what_is_held_is_the_full_caches() -> None:
    model, ids = models.shared("llama"), random_ids(2, 40, seed=1)
    held = [SegmentCache(model, made) for made in (planned(model), None)]
    for cache in held:
        feed(model, cache, ids, [40])
    assert held[0].nbytes == held[1].nbytes
    assert held[0].read_bytes == held[1].read_bytes
    assert not planned(model).dense  # nobody takes the full cache's prompt for this one's


@pytest.mark.parametrize("name", ["pages", "labels", "mass"])
def test_a_selection_and_a_store_come_after(name: str) -> None:
    """Entries of the first layer do not depend on what is read: there a selection finds what it does in a dense one."""
    model, ids = models.double("llama"), random_ids(1, 42, seed=1)
    shape = (model.geometry.layers, model.geometry.kv_heads)
    select = Select(torch.full(shape, 0.5), observed=4)
    keep = Keep.heads(torch.ones(shape), sink=0, recent=1, select=select)
    both = [compose(Plan("keep", model.fingerprint, keep=keep), planned(model, **CASES[name])),
            Plan("keep", model.fingerprint, keep=keep)]  # fmt: skip
    held = []
    for made in both:
        cache = SegmentCache(model, made, prompt_length=40)
        feed(model, cache, ids, [40, 1, 1])
        held.append(cache)
    same(held[0].entries(), held[1].entries())
    first = [next(cache.segments[0].lanes()).recall()[0] for cache in held]
    same(first[0][:, :, :20], first[1][:, :, :20])
    coded = compose(stored(model, "two-bits"), planned(model, **CASES[name]))
    raw = fed(model, planned(model, **CASES[name]), ids, [42])
    close(fed(model, coded, ids, [42]), raw)  # a prompt at once is read before it is encoded


def test_heads_with_a_window_see_what_they_saw() -> None:
    """A layer all of whose heads have windows reads as under that plan alone."""
    model, ids = models.double("llama"), random_ids(1, 40, seed=1)
    keep = ragged(model, seed=3).keep
    assert keep is not None
    keep = replace(keep, recent=keep.recent.where(keep.recent != EVERYTHING, 6))
    alone = Plan("windows", model.fingerprint, keep=keep)
    close(fed(model, replace(planned(model), keep=keep), ids, [20, 18, 1, 1]), fed(model, alone, ids, [20, 18, 1, 1]))


def test_mixed_heads_choose_by_those_that_hold_everything() -> None:
    model, ids = models.double("llama"), random_ids(1, 40, seed=1)
    shape = (model.geometry.layers, model.geometry.kv_heads)
    full = torch.zeros(shape, dtype=torch.bool)
    full[:, 0] = True
    keep = Keep.heads(full, sink=1, recent=5)
    made = replace(planned(model, heads="group"), keep=keep)
    assert error(fed(model, made, ids, [40]), fed(model, replace(made, read=None), ids, [40])) > 1e-2
    assert int(keep.recent[0, 0]) == EVERYTHING


def test_after_eviction_a_chunk_reads_all_that_is_left() -> None:
    model, ids = models.double("llama"), random_ids(1, 60, seed=1)
    shape = (model.geometry.layers, model.geometry.kv_heads)
    keep = Keep.heads(torch.ones(shape), sink=0, recent=1, select=Select(torch.full(shape, 0.5), observed=4))
    cache = SegmentCache(model, replace(planned(model), keep=keep), prompt_length=40)
    feed(model, cache, ids[:, :41], [40, 1])
    q, k = (torch.zeros(1, heads, 9, 8, dtype=torch.float64) for heads in (6, 2))
    layer = cache.segments[0]
    assert layer.sparse is not None
    assert layer.sparse.choose((0, 0), layer.parts[0].lanes, q, k, Step(41, 1.0)) is None


def test_round_trip(tmp_path) -> None:
    model, ids = models.shared("llama"), random_ids(1, 40, seed=1)
    made = planned(model, **LABELS)
    same(fed(model, plans.read(made.write(str(tmp_path / "plan"))), ids, [40]), fed(model, made, ids, [40]))


def test_reads_of_steps_and_of_prompts_compose() -> None:
    model = models.shared("llama")
    steps = Plan("steps", model.fingerprint, read=Read(torch.full((3,), 0.4), unit=4))
    for order in ((steps, planned(model)), (planned(model), steps)):
        made = compose(*order).read
        assert made is not None
        assert made.chooses
        assert made.sparse
    with pytest.raises(InputError, match="fill the slot"):
        compose(planned(model), planned(model, **LABELS))


def test_what_is_refused() -> None:
    model = models.shared("llama")
    shape = (model.geometry.layers, model.geometry.kv_heads)
    by_chunk = Select(torch.full(shape, 8.0), observed=4, when="chunk")
    keep = Keep.heads(torch.ones(shape), sink=0, recent=1, select=by_chunk)
    with pytest.raises(InputError, match="evicted after every chunk"):
        SegmentCache(model, replace(planned(model), keep=keep))
    with pytest.raises(InputError, match="makes the boundaries"):
        SegmentCache(model, replace(planned(model, **LABELS), keep=ragged(model).keep))
    gemma = models.shared("gemma3")
    with pytest.raises(InputError, match="makes the boundaries"):
        SegmentCache(gemma, planned(gemma, **LABELS | dict(leader=0)))
    for bad in (dict(block=0), dict(mass=1.0), dict(mass=0.5, heads="each"), dict(cut="labels", leader=1)):
        with pytest.raises(InputError):
            planned(model, **bad)


def test_no_boundary_is_one_chunk_and_one_chunk_is_recency() -> None:
    """θ = ∞: every block reads its sinks and the newest entries before it."""
    model, ids = models.double("llama"), random_ids(1, 40, seed=1)
    one = planned(model, 10.0, **LABELS | dict(above=float("inf")))
    newest = planned(model, 10.0, local=9)  # all of the budget besides the sink
    close(fed(model, one, ids, [40]), fed(model, newest, ids, [40]))
