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
    """Scored eviction: observe queries → score entries → reduce over queries → pool → reduce over the GQA group →
    budget → select → merge.

    observe: whose attention scores an entry: the `observed` newest queries ("last"), `probes` (the newest 5 % and a
        seeded 5 % of the others), or "all" rows seen so far.
    score: name of the rule (see `cache/scores/`), given the observed queries, keys and values. Rules that look at
        queries soften their softmax by `temperature`, plus `warming` for every step that has scored before.
    reduce: over the observed queries that see the entry: their "mean", "sum" (early entries are seen by more of them)
        or "max"; plus `variance` times their variance (CAKE).
    pool, kernel: smoothing of scores along entries, "none", "mean" or "max" over `kernel` entries.
    group: how the G query heads of a KV head become one score, "mean", "max" or "sum"; `group_first` reduces
        before pooling, else after. `alike`: all heads of a layer go by the mean of their scores.
    budget: fp32 [L,K]: entries a head keeps, as a share of the prompt when ≤ 1, else a count; sinks and recent
        entries included. `spread`: "head" gives each head its own budget; "layer" pools a layer's budget over its heads
        by score, "model" over all, in which a head's count is mixed with `floor` parts of its own budget (AdaKV).
    mass, least: if > 0, a head keeps the fewest entries that hold the share `mass` of its score, or those that score
        `least`, and `budget` is the upper bound.
    sink, recent: entries that always stay.
    when: "prefill" once the prompt is in; "chunk" after every chunk of it, so that prefill stays within the budget
        and one chunk; "step" once the prompt is in and at every decode step, so that the budget holds throughout. Where
        entries are scored again, scores are `decay` times the old ones plus the new ones (or the larger, for "max").
    merge: what becomes of the others: "drop", or averaged into the kept entry whose key has the largest cosine
        ("nearest") or whose place is nearest ("neighbour"), if that cosine is at least `threshold`, or the mean of them
        all when that is None. weigh: "equal"; "cosine", as terms of a plain mean (D2O); "gaussian" by distance of keys.
    count: a kept entry that stands for n entries adds log n to its logit, and weighs n when it is merged again.
    """

    budget: torch.Tensor
    observe: Literal["last", "probes", "all"] = "last"
    observed: int = 32
    score: str = "attention"
    temperature: float = 1.0
    warming: float = 0.0
    reduce: Literal["mean", "sum", "max"] = "mean"
    variance: float = 0.0
    pool: Literal["none", "mean", "max"] = "none"
    kernel: int = 1
    group: Literal["mean", "max", "sum"] = "mean"
    group_first: bool = False
    alike: bool = False
    spread: Literal["head", "layer", "model"] = "head"
    floor: float = 0.0
    mass: float = 0.0
    least: float = 0.0
    sink: int = 0
    recent: int = 0
    when: Literal["prefill", "chunk", "step"] = "prefill"
    decay: float = 1.0
    merge: Literal["drop", "nearest", "neighbour"] = "drop"
    threshold: float | None = 0.0
    weigh: Literal["equal", "cosine", "gaussian"] = "equal"
    count: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if bool((self.budget <= 0).any()) or self.observed < 1 or self.kernel % 2 == 0:
            raise InputError(
                "bad selection",
                got=f"budget {float(self.budget.min())}, {self.observed} observed, kernel {self.kernel}",
                expected="budget > 0, observed >= 1, an odd kernel",
            )  # fmt: skip
        if self.alike and (self.spread != "head" or bool((self.budget != self.budget[:, :1]).any())):
            raise InputError(
                "heads that keep the same entries have the same budget", expected="spread head, one budget a layer"
            )
        if self.when == "chunk" and self.ragged:
            raise InputError(
                "after every chunk each head keeps its own budget",
                got=f"spread {self.spread}, mass {self.mass}, least {self.least}",
                remedy="select once, when=prefill",
            )

    @property
    def lossless(self) -> bool:
        whole = self.when != "step" and not (self.mass or self.least)
        return whole and bool((self.budget == 1.0).all())

    @property
    def ragged(self) -> bool:
        """Do the scores say how many entries a head keeps?"""
        return self.spread != "head" or self.mass > 0 or self.least > 0


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
        selected = self.select is not None and not self.select.lossless and not self.select.alike
        return bool((rows != rows[:, :1]).any()) or selected


@dataclass(frozen=True)
class Store(Record):
    """How entries are encoded: a palette of pairs, and which pair each KV head uses.

    keys, values: encodings. index: int32 [L,K] into both, or RAW. The first `sink` entries and the newest `recent` stay
    raw; entries older than that are encoded `block` at a time, once, in order. Heads with a window hold only sinks
    and recent entries, so theirs stay raw.
    span: so many neighbouring layers, from layer 0 on, are written as one with span·K KV heads. They must all use one
    pair in every head, or all be RAW, and so must those left over.
    """

    keys: tuple[Encoding, ...]
    values: tuple[Encoding, ...]
    index: torch.Tensor
    sink: int = 0
    recent: int = 0
    block: int = 32
    span: int = 1

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
        """Both encodings, one after the other, for every KV head; the longer windows, and blocks that suit both.

        Layers that a store across layers leaves out stay raw."""
        pairs: dict[tuple[int, int], int] = {}
        index = torch.full_like(self.index, RAW)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in self.index.shape)).tolist():
            pair = (int(self.index[tuple(at)]), int(other.index[tuple(at)]))
            apart = (self.span > 1 and pair[0] == RAW) or (other.span > 1 and pair[1] == RAW)
            if pair != (RAW, RAW) and not apart:
                index[tuple(at)] = pairs.setdefault(pair, len(pairs))
        sides = []
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            palettes = ((*mine, Encoding()), (*theirs, Encoding()))  # RAW is the last one
            sides.append(tuple(palettes[0][first].then(palettes[1][second]) for first, second in pairs))
        if self.span != other.span and min(self.span, other.span) > 1:
            raise InputError("both plans join layers, in other numbers", got=f"{self.span} and {other.span}")
        keys, values = sides
        return Store(
            keys, values, index, max(self.sink, other.sink), max(self.recent, other.recent),
            math.lcm(self.block, other.block), max(self.span, other.span),
        )  # fmt: skip

    def check(self, kv_heads: int, width: int) -> None:
        """Raise InputError unless every encoding fits `kv_heads` heads of `width` channels, span by span."""
        for encoding in (*self.keys, *self.values):
            encoding.check(self.span * kv_heads, width)
        if self.span == 1:
            return
        for layer in range(0, len(self.index), self.span):
            used = self.index[layer : layer + self.span]
            if bool((used != used[0, 0]).any()) or (len(used) < self.span and bool((used != RAW).any())):
                raise InputError(
                    f"layers {layer} to {layer + len(used) - 1} cannot be written as one", got=used.tolist(),
                    expected=f"{self.span} layers with one encoding, or none",
                )  # fmt: skip


@dataclass(frozen=True)
class Read(Record):
    """Which entries a decode step touches: the best units of the bulk, besides sinks and recent entries.

    budget: fp32 [L]: entries of the bulk that are read, as a share of the bulk when ≤ 1, else a count.
    unit, form: entries that are chosen together: `unit` consecutive ones ("page"; 1: tokens), or those of a k-means
        cluster of keys, `unit` on average ("cluster"; the last one chosen is cut at the budget).
    summary: what stands for a unit (see `cache/summaries/`); `table` is what it was calibrated with, [L,K,...], and
        `rank` how many of its columns, or of the head's channels, it looks at (0: all).
    sink, recent: entries that are always read, besides. outliers: so many units, too, per KV head: those whose keys
        agree least with their mean (ShadowKV, section 3).
    heads: how the G query heads of a KV head agree on one choice: "max", "mean" or "sum" of their scores, made
        probabilities over units first if `softmax`; or "each" chooses by itself, and the union is read.
    period, jump: a choice is made anew after `period` steps (0: never for its age), and as soon as the cosine between
        the query and the one that chose, averaged over the heads that choose together, is below `jump`. Units that
        have joined the bulk since are read too.
    owner: int32 [L]: the layer whose scores a layer goes by, itself (the default) or an earlier one that goes by its
        own. A layer of budget 1 reads everything, and may be an owner.
    tail: what becomes of the entries that are not read. "drop"; "mean": the share of attention that the scores give
        them goes to the mean value of the bulk (SparF); "estimate": the best `estimated` of all units among them
        take part with their mean value, as many entries of the summary's logit.
    page: entries that memory hands out at once; bytes read are counted in whole pages.
    slow: the bulk of layers with a budget lives in host memory, and what is read is fetched from there.
    """

    budget: torch.Tensor
    unit: int = 16
    form: Literal["page", "cluster"] = "page"
    summary: str = "minmax"
    table: torch.Tensor | None = None
    rank: int = 0
    sink: int = 0
    recent: int = 0
    outliers: int = 0
    heads: Literal["max", "mean", "sum", "each"] = "max"
    softmax: bool = False
    period: int = 1
    jump: float | None = None
    owner: torch.Tensor | None = None
    tail: Literal["drop", "mean", "estimate"] = "drop"
    estimated: float = 1.0
    page: int = 1
    slow: bool = False

    def __post_init__(self) -> None:
        if min(self.unit, self.page) < 1 or min(self.rank, self.outliers, self.period, self.sink, self.recent) < 0:
            raise InputError("bad reading", got=self, expected="unit, page >= 1 and no negative count")
        if bool((self.budget <= 0).any()):
            raise InputError("bad budget", got=float(self.budget.min()), expected="more than 0")
        if self.outliers and self.form != "page":
            raise InputError("outliers are pages", got=f"units of the form {self.form!r}")
        if self.owner is not None:
            layers = torch.arange(len(self.budget))
            if bool((self.owner[self.owner.long()] != self.owner).any()) or bool((self.owner > layers).any()):
                raise InputError(
                    "bad owners", got=self.owner.tolist(), expected="itself or an earlier layer that is its own owner"
                )

    @property
    def lossless(self) -> bool:
        return bool((self.budget == 1.0).all())

    def leader(self, layer: int) -> int:
        """The layer whose scores this layer goes by."""
        return layer if self.owner is None else int(self.owner[layer])

    def followers(self, layer: int) -> list[int]:
        """Other layers that go by this layer's scores."""
        others = [other for other in range(len(self.budget)) if other != layer and self.leader(other) == layer]
        return [other for other in others if self.budget[other] != 1.0]

    def acts(self, layer: int) -> bool:
        """Is anything chosen in this layer, for itself or for another?"""
        return bool(self.budget[layer] != 1.0) or bool(self.followers(layer))

    def check(self, keep: Keep | None) -> None:
        """Raise InputError when entries cannot be read from what `keep` leaves."""
        if keep is None:
            return
        if any(self.followers(layer) for layer in range(len(self.budget))) and not keep.lossless:
            raise InputError(
                "layers read what another layer chooses, but they may hold different entries",
                remedy="compose with a plan that keeps every entry, or let each layer choose by itself",
            )
        if keep.select is not None and keep.select.when == "step":
            raise InputError(
                "entries are evicted one by one at every step, but they are read in units that do not change",
                remedy="compose with a plan that evicts once, after the prompt",
            )


@dataclass(frozen=True)
class Draft(Record):
    """The cache only proposes: `tokens` at a time, verified by the full cache."""

    tokens: int = 4

    @property
    def lossless(self) -> bool:
        """The slot is filled; that the output is the full cache's is the draft's point, not its absence."""
        return False
