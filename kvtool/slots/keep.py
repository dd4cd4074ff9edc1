"""The slot keep: which entries stay. L layers, K KV heads, H query heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from kvtool import registry
from kvtool.errors import InputError
from kvtool.records import Record

EVERYTHING = -1  # in `Keep.recent`: the head keeps every entry


@dataclass(frozen=True)
class Select(Record):
    """Scored eviction: observe queries → score entries → reduce over queries → pool → reduce over the GQA group →
    budget → pick → merge.

    observe: whose attention scores an entry: the `observed` newest queries ("last"; a share of the prompt if < 1),
        `probes` (the newest 5 % and a seeded 5 % of the others), or "all" rows seen so far; or those of a pass on trial
        (see `cache/keep/passes.py`): "rebuild", in which the network writes the prompt again, and "answer", over the
        tokens that follow the prompt, which a caller has to tell. history: at decode steps,
        so many of the newest queries, instead of those since the last choice; their own entries must be recent ones.
    score: name of the rule (see `cache/keep/scores/`), given the observed queries, keys and values. Rules that look at
        queries soften their softmax by `temperature`, plus `warming` for every step that has scored before.
    reduce: over the observed queries that see the entry: their "mean", "sum" (early entries are seen by more of them)
        or "max"; plus `variance` times their variance (CAKE).
    pool, kernel: smoothing of scores along entries, "none", "mean" or "max" over `kernel` entries.
    group: how the G query heads of a KV head become one score, "mean", "max" or "sum"; `group_first` reduces
        before pooling, else after. weights: fp32 [L,H], what each query head's score is multiplied by before.
        `alike`: all heads of a layer go by the mean of their scores.
    budget: fp32 [L,K]: entries a head keeps, as a share of the prompt when ≤ 1, else a count; sinks and recent
        entries included. `spread`: the rule that deals it out (see `cache/keep/budgets/`): "head" gives each head its
        own; "layer" pools a layer's budget over its heads by score, "model" over all, in which a head's count is mixed
        with `floor` parts of its own budget (AdaKV).
    mass, least: if > 0, a head keeps the fewest entries that hold the share `mass` of its score, or those that score
        `least`, and `budget` is the upper bound.
    pick: the rule that chooses so many entries by score (see `cache/keep/picks/`).
    minimum: entries that a head holds at least. sink, recent: entries that always stay; recent is a share of the prompt
        if < 1. Where they alone exceed a budget the newest of them stay, as many as it says: first ones go first.
    when: "prefill" once the prompt is in; "chunk" after every chunk of it, so that prefill stays within the budget
        and one chunk; "step" once the prompt is in and at every decode step, so that the budget holds throughout. Where
        entries are scored again, scores are `decay` times the old ones plus the new ones (or the larger, for "max").
    slack: entries, or the share of the budget if < 1, that decode steps evict beyond it at once, so that it is full
        again only so many steps later.
        growing: budgets that are a share go on being a share of all tokens seen.
    merge: what becomes of the others (see `cache/keep/merges/`): "drop"; averaged into the kept entry whose key has the
        largest cosine ("nearest") or whose place is nearest ("neighbour"), if that cosine is at least `threshold`, or
        the mean of them all when that is None. weigh: "equal"; "cosine", as terms of a plain mean (D2O); "gaussian" by
        distance of keys.
    count: a kept entry that stands for n entries adds log n to its logit, and weighs n when it is merged again.
    settings: what the named rules take besides, numbers or words. tables: what they were calibrated with, [L,...].
    """

    budget: torch.Tensor
    observe: Literal["last", "probes", "all", "rebuild", "answer"] = "last"
    observed: float = 32
    history: int = 0
    score: str = "attention"
    temperature: float = 1.0
    warming: float = 0.0
    reduce: Literal["mean", "sum", "max"] = "mean"
    variance: float = 0.0
    pool: Literal["none", "mean", "max"] = "none"
    kernel: int = 1
    group: Literal["mean", "max", "sum"] = "mean"
    group_first: bool = False
    weights: torch.Tensor | None = None
    alike: bool = False
    spread: str = "head"
    floor: float = 0.0
    mass: float = 0.0
    least: float = 0.0
    pick: str = "best"
    minimum: int = 0
    sink: int = 0
    recent: float = 0
    when: Literal["prefill", "chunk", "step"] = "prefill"
    decay: float = 1.0
    slack: float = 0
    growing: bool = False
    merge: str = "drop"
    threshold: float | None = 0.0
    weigh: Literal["equal", "cosine", "gaussian"] = "equal"
    count: bool = False
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool((self.budget <= 0).any()) or self.observed <= 0 or self.kernel % 2 == 0:
            raise InputError(
                "bad selection",
                got=f"budget {float(self.budget.min())}, {self.observed} observed, kernel {self.kernel}",
                expected="budget > 0, observed > 0, an odd kernel",
            )  # fmt: skip
        if self.history and 1 <= self.recent < self.history:
            raise InputError(
                "queries are remembered longer than their own entries are sure to stay",
                got=f"history {self.history}, recent {self.recent}", expected="recent >= history",
            )  # fmt: skip
        if self.alike and (self.apart or bool((self.budget != self.budget[:, :1]).any())):
            raise InputError(
                "heads that keep the same entries have the same budget",
                expected="a spread that treats the heads of a layer alike, and one budget a layer",
            )
        rule = self.rule("score")
        if self.on_trial and (self.when != "prefill" or rule.SEES != "queries" or hasattr(rule, "NEEDS")):
            raise InputError(
                "a pass on trial scores a prompt's entries once, by queries alone",
                got=f"observe {self.observe}, when {self.when}, score {self.score}",
                expected="when=prefill and a score such as attention",
            )  # fmt: skip
        if self.when == "chunk" and self.ragged:
            raise InputError(
                "after every chunk each head keeps its own budget",
                got=f"spread {self.spread}, mass {self.mass}, least {self.least}, pick {self.pick}",
                remedy="select once, when=prefill",
            )

    def rule(self, stage: str) -> Any:
        """The module of the rule that this selection names for a stage: score, spread, pick or merge."""
        return registry.module(f"cache/keep/{_FOLDERS[stage]}", getattr(self, stage), stage)

    @property
    def on_trial(self) -> bool:
        """Do queries score that come in a pass of their own, once the prompt is in?"""
        return self.observe in ("rebuild", "answer")

    @property
    def by_tokens(self) -> bool:
        """Do all heads and layers drop the same entries at every step, by what their tokens are?"""
        rule = self.rule("score")
        tokens = rule.SEES == "entries" and getattr(rule, "NEEDS", ()) == ("tokens",)
        same = self.alike and bool((self.budget == self.budget[0, 0]).all())
        return tokens and same and self.when == "step" and self.merge == "drop"

    @property
    def lossless(self) -> bool:
        whole = self.when != "step" and not (self.mass or self.least) and not self.rule("pick").RAGGED
        return whole and bool((self.budget == 1.0).all())

    @property
    def apart(self) -> bool:
        """Do the scores say how many entries each head of a layer keeps?"""
        return self.rule("spread").APART or (self.rule("pick").RAGGED and not self.alike)

    @property
    def ragged(self) -> bool:
        """Do the scores say how many entries are kept, so that rows of a batch come to hold different numbers?"""
        by_score = not self.rule("spread").FIXED or self.rule("pick").RAGGED
        return by_score or self.mass > 0 or self.least > 0


_FOLDERS = {"score": "scores", "spread": "budgets", "pick": "picks", "merge": "merges"}


@dataclass(frozen=True)
class Keep(Record):
    """Which entries stay: per KV head everything, or sinks and a recent window; or what a score selects.

    sink, recent: int32 [L,K] entries; recent counts the query's own entry; EVERYTHING keeps all.
    compensate: uint8 [L,K]; 1 folds dropped entries into one averaged entry of weight N (RazorAttention, section 3.3).
    recent_ratio: the window is max(recent, recent_ratio · prompt length).
    position: "original", or "reindex" for positions counted inside the cache (StreamingLLM, section 3.2); "reencode":
        and tokens behind a dropped one are fed again over what is left, where a rule drops by tokens alone.
    select: scored eviction in the heads that the window leaves whole.
    dropped: uint8 [L]; a layer of 1 attends to nothing, in prefill too, and holds nothing (LLM-Drop): what its
        attention puts out is 0 before the output projection.
    onward: which of a prompt's tokens go on through the network (UNComp): `budget` says how many reach each layer, as a
        share of the prompt or a count, and never more than reached the one before; they are chosen by the attention of
        the layer before, all heads together. The others are in no later layer's forward, nor in its cache.
    """

    sink: torch.Tensor
    recent: torch.Tensor
    compensate: torch.Tensor
    recent_ratio: float = 0.0
    position: Literal["original", "reindex", "reencode"] = "original"
    select: Select | None = None
    dropped: torch.Tensor | None = None
    onward: Select | None = None

    def __post_init__(self) -> None:
        if self.onward is not None:
            _check_onward(self.onward)
        if self.position == "reencode" and (self.select is None or not self.select.by_tokens):
            raise InputError(
                "tokens are fed again where every head of every layer drops the same ones",
                expected="a selection at every step that looks at tokens alone, for all heads alike, and merges none",
                remedy="use position=reindex",
            )

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
    def gone(self) -> torch.Tensor:
        """bool [L]: layers that are dropped."""
        return torch.zeros(len(self.recent), dtype=torch.bool) if self.dropped is None else self.dropped.bool()

    @property
    def leaving(self) -> bool:
        """Do tokens of a prompt leave the forward?"""
        return self.onward is not None and not self.onward.lossless

    @property
    def lossless(self) -> bool:
        whole = bool(self.full.all() & ~self.gone.any()) and not self.leaving
        return whole and (self.select is None or self.select.lossless)

    def then(self, other: Keep) -> Keep | None:
        """The layers that one of them drops, and what the other keeps in the rest; None if both do more than drop."""
        for mine, theirs in ((self, other), (other, self)):
            if replace(mine, dropped=None).lossless:
                return replace(theirs, dropped=(mine.gone | theirs.gone).to(torch.uint8))
        return None

    def ragged(self, layer: int) -> bool:
        """May the heads of this layer hold different entries?"""
        rows = torch.stack([self.sink[layer], self.recent[layer], self.compensate[layer].int()])
        selected = self.select is not None and not self.select.lossless and not self.select.alike
        return bool((rows != rows[:, :1]).any()) or selected


def _check_onward(spec: Select) -> None:
    """Raise InputError unless a selection can say which tokens go on."""
    plain = spec.alike and spec.when == "prefill" and spec.merge == "drop" and not (spec.ragged or spec.on_trial)
    if not plain or spec.recent < 1 or bool(spec.budget[0, 0] != 1):
        raise InputError(
            "bad choice of the tokens that go on", got=f"budgets {spec.budget[:, 0].tolist()}, recent {spec.recent}",
            expected="one choice for all heads, made once, by a spread and a pick that keep to their budgets: all of "
            "the prompt in the first layer, and its last token in every other (recent >= 1)",
        )  # fmt: skip
