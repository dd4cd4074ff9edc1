"""The vocabulary of plans: what each slot can say. Data only; the cache executes it.

Shapes: L layers, K KV heads. It knows no method by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.records import Record

EVERYTHING = -1  # in `Keep.recent`: the head keeps every entry
RAW = -1  # in `Store.index`: the head's entries are held as they are


@dataclass(frozen=True)
class Select(Record):
    """Scored eviction: observe queries → score entries → pool → reduce over the GQA group → budget → select → merge.

    observe: whose attention scores an entry: the `observed` newest queries ("last"), `probes` (the newest 5 % and a
        seeded 5 % of the others), or "all" rows seen so far.
    score: name of the rule (see `cache/scores/`), given the observed queries, keys and values.
    pool, kernel: smoothing of scores along entries, "none", "mean" or "max" over `kernel` entries.
    group: how the G query heads of a KV head become one score, "mean", "max" or "sum"; `group_first` reduces
        before pooling, else after.
    budget: fp32 [L,K]: entries a head keeps, as a share of the prompt when ≤ 1, else a count; sinks and recent
        entries included. `spread`: "head" gives each head its own budget; "layer" pools a layer's budget over its heads
        by score, `floor` of it shared out evenly first (AdaKV); "model" pools it over all.
    mass: if > 0, a head keeps the fewest entries that hold this share of its score, and `budget` is the upper bound.
    sink, recent: entries that always stay.
    when: "prefill" once the prompt is in; "step" also at every decode step, so that the budget holds throughout:
        scores are then `decay` times the old ones plus the new query's attention.
    merge: what becomes of the others: "drop", or "nearest": averaged, weighted by their count, into the kept key of
        largest cosine if that is at least `threshold`.
    """

    budget: torch.Tensor
    observe: Literal["last", "probes", "all"] = "last"
    observed: int = 32
    score: str = "attention"
    pool: Literal["none", "mean", "max"] = "none"
    kernel: int = 1
    group: Literal["mean", "max", "sum"] = "mean"
    group_first: bool = False
    spread: Literal["head", "layer", "model"] = "head"
    floor: float = 0.0
    mass: float = 0.0
    sink: int = 0
    recent: int = 0
    when: Literal["prefill", "step"] = "prefill"
    decay: float = 1.0
    merge: Literal["drop", "nearest"] = "drop"
    threshold: float = 0.0
    seed: int = 0

    @property
    def lossless(self) -> bool:
        return bool((self.budget == 1.0).all())


@dataclass(frozen=True)
class Keep(Record):
    """Which entries stay: per KV head everything, or sinks and a recent window; or what a score selects.

    sink, recent: int32 [L,K] entries; recent counts the query's own entry; EVERYTHING keeps all.
    compensate: uint8 [L,K]; 1 folds dropped entries into one averaged entry of weight N (RazorAttention, section 3.3).
    recent_ratio: the window is max(recent, recent_ratio · prompt length).
    position: "original", or "reindex" for positions counted inside the cache (StreamingLLM, section 3.2).
    select: scored eviction in the heads that the window leaves whole.
    """

    sink: torch.Tensor
    recent: torch.Tensor
    compensate: torch.Tensor
    recent_ratio: float = 0.0
    position: Literal["original", "reindex"] = "original"
    select: Select | None = None

    @classmethod
    def heads(cls, full: torch.Tensor, *, sink: int, recent: int, compensate: bool = False, **options: Any) -> Keep:
        """full bool [L,K]: those heads keep everything, the others `sink` + `recent` entries."""
        if sink < 0 or recent < 1:
            raise InputError("bad window", got=f"sink {sink}, recent {recent}", expected="sink >= 0 and recent >= 1")
        full = full.bool()
        return cls(
            sink=torch.where(full, 0, sink).int(),
            recent=torch.where(full, EVERYTHING, recent).int(),
            compensate=(~full & compensate).to(torch.uint8),
            **options,
        )

    @property
    def full(self) -> torch.Tensor:
        """bool [L,K]: heads that no window restricts."""
        return self.recent == EVERYTHING

    @property
    def lossless(self) -> bool:
        return bool(self.full.all()) and (self.select is None or self.select.lossless)

    def ragged(self, layer: int) -> bool:
        """May the heads of this layer hold different entries?"""
        rows = torch.stack([self.sink[layer], self.recent[layer], self.compensate[layer].int()])
        selected = self.select is not None and not self.select.lossless
        return bool((rows != rows[:, :1]).any()) or selected


@dataclass(frozen=True)
class Store(Record):
    """How entries are encoded: a palette of pairs, and which pair each KV head uses.

    keys, values: encodings. index: int32 [L,K] into both, or RAW. The first `sink` entries and the newest `recent` stay
    raw; entries older than that are encoded `block` at a time, once, in order. Heads with a window hold only sinks
    and recent entries, so theirs stay raw.
    """

    keys: tuple[Encoding, ...]
    values: tuple[Encoding, ...]
    index: torch.Tensor
    sink: int = 0
    recent: int = 0
    block: int = 32

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise InputError("encodings come in pairs", got=f"{len(self.keys)} for keys, {len(self.values)} for values")
        for encoding in (*self.keys, *self.values):
            if self.block < 1 or self.block % encoding.block:
                raise InputError("bad block", got=self.block, expected=f"a multiple of {encoding.block} entries")

    @property
    def lossless(self) -> bool:
        used = [number for number in self.index.unique().tolist() if number != RAW]
        return all(self.keys[number].lossless and self.values[number].lossless for number in used)

    def then(self, other: Store) -> Store:
        """Both encodings, one after the other, for every KV head; the longer windows, and blocks that suit both."""
        pairs: dict[tuple[int, int], int] = {}
        index = torch.full_like(self.index, RAW)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in self.index.shape)).tolist():
            pair = (int(self.index[tuple(at)]), int(other.index[tuple(at)]))
            if pair != (RAW, RAW):
                index[tuple(at)] = pairs.setdefault(pair, len(pairs))
        sides = []
        for side in ("keys", "values"):
            palettes = [(*getattr(store, side), Encoding()) for store in (self, other)]  # RAW is the last one
            sides.append(tuple(palettes[0][first].then(palettes[1][second]) for first, second in pairs))
        return Store(
            *sides, index, max(self.sink, other.sink), max(self.recent, other.recent), math.lcm(self.block, other.block)
        )


@dataclass(frozen=True)
class Read(Record):
    """Which entries a decode step touches: the `budget` best units of the bulk, besides sinks and recent entries.

    unit: entries that are chosen together (1: tokens). summary: what stands for a unit (see `cache/summaries/`).
    budget: fp32 [L]: entries of the bulk that are read, as a share of the bulk when ≤ 1, else a count.
    sink, recent: entries that are always read, besides.
    heads: how the G query heads of a KV head agree on one choice: "max", "mean" or "sum" of their scores.
    period: a choice is made anew every `period` steps.
    slow: the bulk lives in host memory, and what is read is moved from there.
    """

    budget: torch.Tensor
    unit: int = 16
    summary: str = "minmax"
    sink: int = 0
    recent: int = 0
    heads: Literal["max", "mean", "sum"] = "max"
    period: int = 1
    slow: bool = False

    @property
    def lossless(self) -> bool:
        return bool((self.budget == 1.0).all())


@dataclass(frozen=True)
class Draft(Record):
    """The cache only proposes: `tokens` at a time, verified by the full cache."""

    tokens: int = 4

    @property
    def lossless(self) -> bool:
        """The slot is filled; that the output is the full cache's is the draft's point, not its absence."""
        return False
