"""Law 3: the bytes reported are the bytes held, and the allocator agrees."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import GROWTH
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import EVERYTHING, Keep
from tests import models
from tests.laws.methods import TINY, tiny
from tests.models import random_ids
from tests.running import feed

IDS = random_ids(2, 120, seed=6)
CHUNKS = [116, *[1] * 4]


def grown(model: Model, cache: SegmentCache) -> int:
    """Bytes by which the CPU allocator's balance grows while `cache` is filled and everything else is dropped."""
    before = SegmentCache(model, cache.plan, prompt_length=cache.prompt_length)
    feed(model, before, IDS, CHUNKS)  # for tables that the model and the kernels make once
    gc.disable()  # what only the cycle collector would free counts as held
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            feed(model, cache, IDS, CHUNKS)
    finally:
        gc.enable()
    events = watched.profiler.kineto_results.events()  # `watched.events()` says the same after a second of parsing
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("case", [None, *TINY])
def test_the_allocator_follows(case: str | None, name: str) -> None:
    model = models.shared(name)
    cache = SegmentCache(model, None if case is None else tiny(case, name))
    assert cache.nbytes == 0
    assert grown(model, cache) == cache.nbytes
    held = [buffer for layer in cache.segments for lane in layer.lanes() for buffer in lane.buffers()]
    assert cache.nbytes == sum(buffer.nbytes for buffer in held)
    assert len({buffer.data_ptr() for buffer in held}) == len(held)  # nothing is counted twice
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in held)  # no view into something larger


@pytest.mark.parametrize("case", [None, *TINY])
def test_what_nobody_holds_is_freed_at_once(case: str | None) -> None:
    """By the last reference to it, not by the garbage collector, which does not know how much a tensor holds."""
    model = models.shared("llama")
    cache = SegmentCache(model, None if case is None else tiny(case, "llama"))
    feed(model, cache, IDS[:1], CHUNKS)
    gone = [weakref.ref(each) for each in (cache, *cache.segments)]
    gc.disable()
    try:
        del cache
        assert not any(each() for each in gone)
    finally:
        gc.enable()


def test_a_cache_that_hoards_is_found_out(llama: Model) -> None:
    class Hoarder(Bulk):
        def step(self, q, k, v, step):
            self.hidden = [*getattr(self, "hidden", []), k.clone()]
            return super().step(q, k, v, step)

    cache = SegmentCache(llama)
    geometry = llama.geometry
    for layer in cache.segments:
        layer.make = lambda number: [Hoarder(list(range(geometry.kv_heads)))]
    hoard = geometry.layers * IDS.numel() * geometry.kv_heads * geometry.head_dim * 4
    assert grown(llama, cache) == cache.nbytes + hoard


def test_a_window_is_all_that_is_held(llama: Model) -> None:
    g, sink, recent = llama.geometry, 3, 9
    nothing = torch.zeros(g.layers, g.kv_heads, dtype=torch.bool)
    plan = Plan("window", llama.fingerprint, keep=Keep.heads(nothing, sink=sink, recent=recent))
    cache = SegmentCache(llama, plan)
    feed(llama, cache, IDS, CHUNKS)
    entry = 2 * IDS.shape[0] * g.head_dim * 4
    assert cache.nbytes == cache.read_bytes == g.layers * g.kv_heads * (sink + recent) * entry
    assert cache.entries().tolist() == [[sink + recent] * g.kv_heads] * g.layers
    assert cache.moved_bytes == 0


def test_slack_is_bounded_and_reported(llama: Model) -> None:
    cache = SegmentCache(llama)
    feed(llama, cache, IDS, CHUNKS)
    g = llama.geometry
    entry = 2 * IDS.shape[0] * g.layers * g.kv_heads * g.head_dim * 4
    assert cache.read_bytes == 120 * entry
    assert 0 <= cache.nbytes - cache.read_bytes < GROWTH * entry


def test_entries_are_per_head(llama: Model) -> None:
    g = llama.geometry
    sink, recent = torch.zeros(g.layers, g.kv_heads).int(), torch.full((g.layers, g.kv_heads), EVERYTHING).int()
    compensate = torch.zeros(g.layers, g.kv_heads, dtype=torch.uint8)
    sink[1, 1], recent[1, 1], compensate[2, 0], sink[2, 0], recent[2, 0] = 2, 5, 1, 1, 7
    cache = SegmentCache(llama, Plan("mixed", llama.fingerprint, keep=Keep(sink, recent, compensate)))
    feed(llama, cache, IDS, CHUNKS)
    assert cache.entries().tolist() == [[120, 120], [120, 7], [9, 120]]
