"""What one sequence's cache holds and reads at a context length: a cache is filled with random entries, and asked.

No formula says what a plan holds. A cache of the plan is given N − 1 random keys, values and queries a layer, layer by
layer and without running the model, takes one decode step, and its own ledgers are read. Beyond the plan's windows and
counts they are affine in N, which three lengths measure and check:

    x(N) = x(a) + (N − a) · (x(c) − x(a)) / (c − a)        a < b < c;  deviation = |x(b) measured / x(b) by this − 1|

A deviation of 0 means that longer contexts are exact, unless a plan's shares are no whole pages or entries of the
distance between two anchors, and are rounded (`whole`); else they are that close. Counts that depend on what is in a
text are those of noise (see `depends`): neighbouring queries are unlike, and attention is flat.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cost.formulas import Ledger
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import EVERYTHING, Store

ROUNDING = 1e-6  # of a share in fp32
GRID = 1280  # anchors are multiples, 5 · 256: whole blocks and pages, and whole pages of shares like 0.1 or 0.25


@dataclass(frozen=True)
class Measured:
    """Ledgers by length, and the line through the first and the last anchor for longer contexts."""

    at: dict[int, Ledger]
    anchors: tuple[int, int, int]

    def __call__(self, tokens: int) -> Ledger:
        return self.at[tokens] if tokens in self.at else self._line(tokens)

    def _line(self, tokens: float) -> Ledger:
        low, _, high = self.anchors
        share = (tokens - low) / (high - low)
        ends = (asdict(self.at[low]), asdict(self.at[high]))
        return Ledger(**{name: ends[0][name] + share * (ends[1][name] - ends[0][name]) for name in ends[0]})

    @property
    def deviation(self) -> float:
        """Of what is held and read at the middle anchor, the larger."""
        middle = self.anchors[1]
        seen, line = asdict(self.at[middle]), asdict(self._line(middle))
        return max((abs(seen[name] / line[name] - 1) for name in ("held", "read") if line[name]), default=0.0)

    def break_even(self, streamed: float, batch: int) -> float:
        """The length at which `batch` sequences' caches are as much to read as the weights; infinite for caches that
        stay smaller."""
        wanted, low = streamed / batch, self.anchors[0]
        known = [(0, 0.0), *((tokens, cache.read) for tokens, cache in sorted(self.at.items()) if tokens <= low)]
        for (before, less), (after, more) in pairwise(known):
            if more >= wanted:
                return before + (after - before) * (wanted - less) / (more - less)
        slope = self._line(low + 1).read - self.at[low].read
        return low + (wanted - self.at[low].read) / slope if slope > 0 else math.inf


def measure(model: Model, plan: Plan | None, lengths: list[int], *, seed: int = 0) -> Measured:
    """At the anchors, and at all shorter `lengths` (tokens, 2 or more each)."""
    first = GRID * (largest(model, plan) // GRID + 1)
    anchors = (first, first + GRID, first + 2 * GRID)
    wanted = sorted({*anchors, *(length for length in lengths if length < first)})
    return Measured({tokens: ledger(model, plan, tokens, seed=seed) for tokens in wanted}, anchors)


@torch.no_grad()
def ledger(model: Model, plan: Plan | None, tokens: int, *, seed: int = 0) -> Ledger:
    """After a decode step, with `tokens` in the context."""
    geometry, device = model.geometry, model.device
    draw = torch.Generator(device=device).manual_seed(seed)
    words = torch.randint(geometry.vocabulary, (1, tokens), generator=draw, device=device)

    def drawn(heads: int, count: int) -> torch.Tensor:
        shape = (1, heads, count, geometry.head_dim)
        return torch.randn(shape, generator=draw, device=device, dtype=torch.float32).to(model.dtype)

    def entries(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return drawn(geometry.query_heads, count), drawn(geometry.kv_heads, count), drawn(geometry.kv_heads, count)

    made = SegmentCache(model, plan, prompt_length=tokens - 1)
    calls = [replace(probe.call, padding=None, positions=None, tokens=words[:, :-1]) for probe in model.probe]
    if plan is None:
        for layer, call in zip(made.segments, calls, strict=True):
            layer.fill(*entries(tokens - 1), call)
    else:
        full = SegmentCache(model)
        full.record_for(plan)
        for layer, source, call in zip(made.segments, full.segments, calls, strict=True):
            source.fill(*entries(tokens - 1), call)
            layer.adopt(source)
            source.reset()
        made.finish()
    before = made.moved_bytes
    for layer, call in zip(made.segments, calls, strict=True):
        layer.attend(*entries(1), replace(call, tokens=words[:, -1:]))
    slow = made.slow_bytes
    return Ledger(made.nbytes - slow, slow, made.read_bytes, made.moved_bytes - before, int(made.entries().sum()))


def largest(model: Model, plan: Plan | None) -> int:
    """A length beyond which no window, sink or count of the model or the plan makes a difference any more."""
    sizes: list[float] = [0, *(window or 0 for window in model.geometry.windows)]
    keep, read = (None, None) if plan is None else (plan.keep, plan.read)
    if keep is not None:
        windows = keep.sink.long() + torch.where(keep.recent == EVERYTHING, 0, keep.recent.long())
        sizes.append(int(windows.max()))
        if keep.recent_ratio:
            sizes.append(int(windows.max()) / keep.recent_ratio)  # from here on the share is the larger
        if keep.select is not None:
            select = keep.select
            least = max(select.sink + select.recent, select.minimum)
            sizes += [float(select.budget.max()), select.observed, least / min(1.0, float(select.budget.min()))]
    if plan is not None and plan.store is not None:
        sizes.append(_stored(plan.store))
    if read is not None:
        sizes += [read.sink + read.recent + float(read.budget.max()) + read.unit * (1 + read.outliers)]
    return math.ceil(max(sizes))


def _stored(store: Store) -> int:
    older = 0 if store.older is None else _stored(store.older)
    return store.sink + store.recent + store.block + store.held + older


def whole(plan: Plan | None) -> bool:
    """Are all shares of the plan whole pages or entries at every multiple of the grid, so that nothing is rounded?"""
    shares: list[torch.Tensor] = []
    if plan is not None and plan.keep is not None and plan.keep.select is not None:
        shares.append(plan.keep.select.budget.double() * GRID)
    if plan is not None and plan.read is not None:
        grain = plan.read.unit if plan.read.form == "page" else 1
        shares.append(plan.read.budget.double() * GRID / grain)
    return all(bool(((x - x.round()).abs() < ROUNDING * GRID).all()) for x in shares)


def depends(plan: Plan | None) -> list[str]:
    """What in a plan makes its bytes depend on the text, so that random entries only stand for it."""
    found = []
    select = None if plan is None or plan.keep is None else plan.keep.select
    if select is not None:
        found += ["keep.select.mass"] * (select.mass > 0) + ["keep.select.least"] * (select.least > 0)
        found += ["keep.select.spread"] * (select.rule("spread").LEVEL == "model")
        found += ["keep.select.pick"] * (select.rule("pick").RAGGED and not select.lossless)
    found += ["keep.onward"] * (plan is not None and plan.keep is not None and plan.keep.leaving)
    read = None if plan is None else plan.read
    if read is not None and not read.lossless:
        found += ["read.cut"] * (read.cut is not None) + ["read.jump"] * (read.jump is not None)
        found += ["read.heads"] * (read.heads == "each") + ["read.slow"] * read.slow
    return found
