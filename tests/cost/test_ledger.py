"""What a cache of random entries holds and reads is what one does that was fed tokens; longer ones lie on a line."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segments import GROWTH
from kvtool.cost.formulas import Ledger
from kvtool.cost.ledger import GRID, Measured, depends, largest, ledger, measure, whole
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Read, Select
from tests import models
from tests.laws.methods import tiny
from tests.models import random_ids
from tests.running import feed

TOKENS = 120
CASES = ["ragged", "kivi-0", "snapkv-0", "h2o-0", "streaming-0", "quest-0", "minicache-0", "mikv-0", "llm-drop-0"]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("case", [None, *CASES])
def test_as_if_it_had_been_fed(case: str | None, name: str) -> None:
    model = models.shared(name)
    plan = None if case is None else tiny(case, name)
    seen = ledger(model, plan, TOKENS)
    cache = SegmentCache(model, plan, prompt_length=TOKENS - 1)
    feed(model, cache, random_ids(1, TOKENS, seed=6), [TOKENS - 1, 1])
    assert (seen.read, seen.moved) == (cache.read_bytes, cache.moved_bytes)
    assert seen.entries == int(cache.entries().sum())
    slack = model.geometry.layers * model.geometry.kv_heads * GROWTH * 2 * model.geometry.head_dim * 4
    assert abs(seen.held + seen.slow - cache.nbytes) <= slack
    assert depends(plan) == []


@pytest.mark.parametrize("case", [None, "kivi-0", "streaming-0"])
def test_longer_contexts_lie_on_the_line(case: str | None) -> None:
    model = models.shared("llama")
    plan = None if case is None else tiny(case, "llama")
    seen = measure(model, plan, [40, 5 * GRID])
    assert seen.deviation == 0
    assert sorted(seen.at) == [40, *seen.anchors]
    assert seen(40) == ledger(model, plan, 40)
    assert seen(5 * GRID) == ledger(model, plan, 5 * GRID)


@pytest.mark.parametrize(("share", "pages"), [(0.1, 0), (0.25, 0), (1 / 3, 3)])
def test_shares_of_pages_are_rounded(llama: Model, share: float, pages: int) -> None:
    """Off the line by pages, not by a share of what is read; and not at all where shares are whole pages."""
    plan = Plan("pages", llama.fingerprint, read=Read(torch.full((llama.geometry.layers,), share), unit=4))
    seen, far = measure(llama, plan, []), 5 * GRID
    page = llama.geometry.layers * llama.geometry.kv_heads * 4 * 2 * llama.geometry.head_dim * 4
    assert whole(plan) == (pages == 0)
    assert seen.deviation < page / seen(2 * GRID).read
    assert abs(seen(far).read - ledger(llama, plan, far).read) <= pages * page  # half a page at each end, over twice


def test_a_bulk_in_host_memory(llama: Model) -> None:
    """Sinks, recent entries and summaries stay; the bulk is the host's, and a step brings what it reads."""
    layers, heads, width = llama.geometry.layers, llama.geometry.kv_heads, llama.geometry.head_dim
    read = Read(torch.full((layers,), 0.25), unit=8, sink=8, recent=8, summary="mean", slow=True)
    seen = ledger(llama, Plan("slow", llama.fingerprint, read=read), 8 + 8 + 64)
    entry = layers * heads * 2 * width * 4
    assert seen.slow == 64 * entry
    assert seen.moved == 16 * entry
    assert depends(Plan("slow", llama.fingerprint, read=read)) == ["read.slow"]


def test_lines_begin_beyond_every_window(llama: Model) -> None:
    shape = (llama.geometry.layers, llama.geometry.kv_heads)
    nothing = torch.zeros(shape, dtype=torch.bool)
    window = Plan("window", llama.fingerprint, keep=Keep.heads(nothing, sink=100, recent=2000))
    assert largest(llama, window) == 2100
    assert measure(llama, window, []).anchors[0] == 2 * GRID
    share = Plan("share", llama.fingerprint, keep=Keep.heads(~nothing, sink=0, recent=1,
                 select=Select(torch.full(shape, 0.1), sink=4, recent=60)))  # fmt: skip
    assert largest(llama, share) == 640  # from here on a tenth is more than the 64 that always stay
    count = replace(share, keep=replace(share.keep, select=Select(torch.full(shape, 1500.0))))
    assert largest(llama, count) == 1500


def test_what_looks_at_the_text_is_named(llama: Model) -> None:
    shape = (llama.geometry.layers, llama.geometry.kv_heads)
    keep = Keep.heads(torch.ones(shape, dtype=torch.bool), sink=0, recent=1,
                      select=Select(torch.ones(shape), mass=0.9))  # fmt: skip
    read = Read(torch.full((shape[0],), 0.5), heads="each", jump=0.7)
    assert depends(Plan("both", llama.fingerprint, keep=keep, read=read)) == [
        "keep.select.mass", "read.jump", "read.heads",
    ]  # fmt: skip
    assert depends(None) == []


def line(read: float, slope: float) -> Measured:
    made = {tokens: Ledger(0, 0, read + slope * tokens, 0, 0) for tokens in (1000, 2000, 3000)}
    return Measured(made, (1000, 2000, 3000))


def test_break_even() -> None:
    seen = line(50.0, 2.0)
    assert seen.break_even(20_050.0, 1) == 10_000
    assert seen.break_even(20_050.0, 10) == pytest.approx(1000 * 2005 / 2050)  # below the line: towards nothing at 0
    assert line(7.0, 0.0).break_even(8.0, 1) == math.inf
    assert seen(6000).read == 50 + 2 * 6000


def test_a_bend_is_reported() -> None:
    seen = line(0.0, 1.0)
    seen.at[2000] = Ledger(0, 0, 2200.0, 0, 0)
    assert round(seen.deviation, 6) == 0.1
