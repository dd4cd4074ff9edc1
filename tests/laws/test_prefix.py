"""A prefix that is computed and held once equals one that every row was fed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import GROWTH
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Select
from tests import models
from tests.laws.methods import TINY, across, on, ragged
from tests.laws.readings import CASES, reading
from tests.laws.stores import NAMES, PAIRED, stored
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same

ROWS = 3
MADE_ANEW = ("graph", "graph-of-all", "inverted", "inverted-once")
CONTINUATION = [4, *[1] * 11, 6, 1]  # past the next block of every store
TOKENS = sum(CONTINUATION)


def prefixed(model: Model, plan: Plan | None, ids: torch.Tensor, protocol: str = "official", **options) -> SegmentCache:
    """A finished cache that holds ids [1,T]."""
    cache = SegmentCache(model, plan, protocol=protocol, **options)  # type: ignore[arg-type]
    if ids.shape[1]:
        fed(model, cache, ids, [ids.shape[1]])
    cache.finish()
    return cache


def fed(model: Model, cache: SegmentCache, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of ids [B,T], whose positions go on from what the cache holds."""
    with model.served(), torch.no_grad():
        outs = [model.network(input_ids=x, past_key_values=cache).logits for x in ids.split(chunks, 1)]
    return torch.cat(outs, dim=1)


def equals_separate(model: Model, plan: Plan | None, length: int, protocol: str = "official") -> None:
    prefix, rows = random_ids(1, length, seed=1), random_ids(ROWS, TOKENS, seed=2)
    shared = prefixed(model, plan, prefix, protocol)
    together = fed(model, SegmentCache(model, plan, protocol=protocol, prefix=shared), rows, CONTINUATION)  # type: ignore[arg-type]
    for row in range(ROWS):
        alone = prefixed(model, plan, prefix, protocol)
        close(together[row : row + 1], fed(model, alone, rows[row : row + 1], CONTINUATION))


@pytest.mark.parametrize("protocol", ["official", "strict"])
@pytest.mark.parametrize("length", [3, 21])
@pytest.mark.parametrize("case", TINY)
def test_methods(case: str, length: int, protocol: str, llama: Model) -> None:
    model, plan = on(case, llama)
    stepping = plan.keep is not None and plan.keep.select is not None and plan.keep.select.when == "step"
    written_again = plan.store is not None and len(plan.store.chain) > 1
    short = plan.store is not None and plan.store.fits and not plan.store.once and length <= plan.store.recent
    index = None if plan.read is None else plan.read.index
    if index in ("graph", "cluster") or stepping or across(plan) or written_again or short:
        with pytest.raises(InputError, match=r"cannot be shared|written as one|nothing to fit"):
            equals_separate(model, plan, length, protocol)
    else:
        equals_separate(model, plan, length, protocol)


@pytest.mark.parametrize("length", [3, 30, 41])
@pytest.mark.parametrize("name", [name for name in CASES if name not in MADE_ANEW])
def test_readings(name: str, length: int) -> None:
    model = models.double("llama")
    equals_separate(model, reading(model, name), length)


@pytest.mark.parametrize("name", MADE_ANEW)
def test_an_index_of_everything_is_not_shared(name: str) -> None:
    """It is made of all entries when they are first read, and anew when there are twice as many."""
    model = models.shared("llama")
    with pytest.raises(InputError, match="make an index of anew cannot be shared"):
        equals_separate(model, reading(model, name), 30)


@pytest.mark.parametrize("length", [4, 37])
@pytest.mark.parametrize("name", [*NAMES, *PAIRED])
def test_stores(name: str, length: int) -> None:
    model = models.double("llama")
    equals_separate(model, stored(model, name, sink=2), length)


@pytest.mark.parametrize("compressed", [False, True])
def test_corner_cases_of_attention(compressed: bool, any_model: Model) -> None:
    equals_separate(any_model, ragged(any_model) if compressed else None, 13)


@pytest.mark.parametrize("spread", ["head", "layer", "model"])
def test_selected_prefixes(spread: str) -> None:
    """What the prefix's scores select, each head its own number, and stored before RoPE at its true positions."""
    model = models.double("llama")
    shape = (model.geometry.layers, model.geometry.kv_heads)
    select = Select(torch.full(shape, 0.6), observed=4, spread=spread, recent=2)  # type: ignore[arg-type]
    keep = Keep.heads(torch.ones(shape), sink=0, recent=1, select=select)
    equals_separate(model, Plan("select", model.fingerprint, keep=keep), 30)
    equals_separate(model, stored(model, "before-rope", keep=keep), 30)


def test_a_tree_of_prefixes(llama: Model) -> None:
    """A branch of one row is itself a prefix."""
    for plan in (None, ragged(llama)):
        trunk, limb, leaves = random_ids(1, 17, seed=1), random_ids(1, 9, seed=2), random_ids(ROWS, 8, seed=3)
        first = prefixed(llama, plan, trunk)
        second = SegmentCache(llama, plan, prefix=first)
        fed(llama, second, limb, [9])
        third = SegmentCache(llama, plan, prefix=second)
        together = fed(llama, third, leaves, [4, *[1] * 4])
        for row in range(ROWS):
            alone = prefixed(llama, plan, trunk)
            fed(llama, alone, limb, [9])
            close(together[row : row + 1], fed(llama, alone, leaves[row : row + 1], [4, *[1] * 4]))


@pytest.mark.parametrize("name", ["none", "ragged", "four-bits", "own-jumps", "segment-tails", "exact-outliers"])
def test_branches_leave_each_other_alone(name: str) -> None:
    model = models.double("llama")
    plan = None if name == "none" else ragged(model) if name == "ragged" else None
    if plan is None and name != "none":
        plan = reading(model, name) if name in CASES else stored(model, name)
    prefix, one, two = random_ids(1, 21, seed=1), random_ids(2, 20, seed=2), random_ids(1, 20, seed=3)
    shared = prefixed(model, plan, prefix)
    branch = SegmentCache(model, plan, prefix=shared)
    alone, early = prefixed(model, plan, prefix), fed(model, branch, one[:, :9], [4, *[1] * 5])
    close(fed(model, shared, two, [1] * 20), fed(model, alone, two, [1] * 20))  # the prefix goes on by itself
    late = fed(model, branch, one[:, 9:], [1] * 11)
    again = SegmentCache(model, plan, prefix=prefixed(model, plan, prefix))
    close(torch.cat([early, late], dim=1), fed(model, again, one, [4, *[1] * 16]))


def test_the_prefix_is_counted_once(llama: Model) -> None:
    g, prefix = llama.geometry, random_ids(1, 130, seed=1)
    shared = prefixed(llama, None, prefix)
    cache = SegmentCache(llama, prefix=shared)
    assert cache.get_seq_length() == 130
    assert cache.nbytes == shared.nbytes
    assert cache.read_bytes == shared.read_bytes
    fed(llama, cache, random_ids(ROWS, 5, seed=2), [5])
    entry = 2 * g.layers * g.kv_heads * g.head_dim * 4
    assert cache.nbytes == shared.nbytes + ROWS * GROWTH * entry
    assert cache.read_bytes == (130 + ROWS * 5) * entry
    assert cache.entries().tolist() == [[135] * g.kv_heads] * g.layers
    held = {buffer.data_ptr(): buffer.nbytes for lane in cache._all() for buffer in lane.buffers()}
    assert cache.nbytes == sum(held.values())
    theirs = {buffer.data_ptr() for lane in shared._all() for buffer in lane.buffers()}
    assert theirs <= set(held)  # nothing was copied


def test_what_still_moves_is_each_rows_own(llama: Model) -> None:
    plan = stored(llama, "four-bits", sink=2, recent=3, block=8)
    shared = prefixed(llama, plan, random_ids(1, 40, seed=1))  # 2 sinks, 32 coded, 6 recent
    cache = SegmentCache(llama, plan, prefix=shared)
    fed(llama, cache, random_ids(ROWS, 1, seed=2), [1])
    (lane,) = cache.segments[0].lanes()
    assert [segment.length for segment in lane.shared] == [2, 32]
    assert (lane.sinks.length, lane.bulk.length, lane.recent.length) == (0, 0, 7)
    assert lane.recent.k.shape[0] == ROWS


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("compressed", [False, True])
def test_generate(compressed: bool, way: dict[str, int], llama: Model) -> None:
    """Four continuations by `generate`, which is given the prefix's tokens too and feeds what follows them."""
    plan = ragged(llama) if compressed else None
    prefix, rows = random_ids(1, 19, seed=1), random_ids(4, 6, seed=2)
    ids = torch.cat([prefix.expand(4, -1), rows], dim=1)
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **way}
    mask = torch.ones_like(ids)
    with llama.served():
        cache = SegmentCache(llama, plan, prefix=prefixed(llama, plan, prefix))
        written = llama.network.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        if compressed:  # the same protocol, each row fed the prefix first
            expected = []
            for row in ids:
                alone = prefixed(llama, plan, prefix)
                expected.append(
                    llama.network.generate(row[None], attention_mask=mask[:1], past_key_values=alone, **options)
                )
    if not compressed:
        own = DynamicCache(config=llama.network.config)
        same(written, llama.network.generate(ids, attention_mask=mask, past_key_values=own, **options))
    elif not way:
        same(written, torch.cat(expected))


def test_refused(llama: Model) -> None:
    prefix = random_ids(1, 8)
    plan = ragged(llama)
    shared = prefixed(llama, plan, prefix)
    with pytest.raises(InputError, match="another plan"):
        SegmentCache(llama, prefix=shared)
    with pytest.raises(InputError, match="another plan or protocol"):
        SegmentCache(llama, plan, protocol="strict", prefix=shared)
    with pytest.raises(InputError, match="another model"):
        SegmentCache(models.build("llama", seed=1), prefix=prefixed(llama, None, prefix))
    with pytest.raises(InputError, match="one sequence"):
        SegmentCache(llama, prefix=prefixed(llama, None, random_ids(2, 8)))
    with pytest.raises(InputError, match="one sequence"):
        SegmentCache(llama, prefix=SegmentCache(llama))
    shape = (llama.geometry.layers, llama.geometry.kv_heads)
    for when, match in (("step", "evicts at every step"), ("prefill", "not finished")):
        select = Select(torch.full(shape, 5.0), observe="all", when=when)  # type: ignore[arg-type]
        made = Plan("select", llama.fingerprint, keep=Keep.heads(torch.ones(shape), sink=0, recent=1, select=select))
        cache = SegmentCache(llama, made)
        feed(llama, cache, prefix, [8])
        if when == "step":
            cache.finish()
        with pytest.raises(InputError, match=match):
            SegmentCache(llama, made, prefix=cache)
    cache, mask = SegmentCache(llama, prefix=prefixed(llama, None, prefix)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 8] = 0
    with llama.served(), pytest.raises(InputError, match="cannot be padded"):
        llama.network(input_ids=random_ids(2, 3), attention_mask=mask, past_key_values=cache)


def test_a_window_that_is_a_share_of_the_prompt_is_the_prefixes(llama: Model) -> None:
    made = ragged(llama)
    assert made.keep is not None
    plan = replace(made, keep=replace(made.keep, recent_ratio=0.5))
    ids, rows = random_ids(1, 30, seed=1), random_ids(2, 6, seed=2)
    shared = prefixed(llama, plan, ids, prompt_length=30)
    together = fed(llama, SegmentCache(llama, plan, prefix=shared), rows, [6])
    alone = prefixed(llama, plan, ids, prompt_length=30)
    close(together[:1], fed(llama, alone, rows[:1], [6]))
