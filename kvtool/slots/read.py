"""The slot read: which entries a query touches. L layers, K KV heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from kvtool import registry
from kvtool.errors import InputError
from kvtool.records import Record, alike
from kvtool.slots.keep import Keep
from kvtool.slots.prefill import Prefill

Position = Literal["shared", "contiguous"]


@dataclass(frozen=True)
class Documents(Record):
    """How documents that were read apart take part in attention beside the text that follows them: their logits are
    divided by the temperature, and the log-sum-exp of all of them together, in the unit of undivided logits, counts
    `scale` times (see `cache/share/contexts.py`). temperature, scale: fp32 [L].

    position: every document stands where it was read ("shared"), or one behind the other ("contiguous").
    """

    temperature: torch.Tensor
    scale: torch.Tensor
    position: Position = "shared"

    def __post_init__(self) -> None:
        if bool((self.temperature <= 0).any()) or bool((self.scale <= 0).any()):
            raise InputError(
                "bad documents", got=f"temperature {float(self.temperature.min())}, scale {float(self.scale.min())}",
                expected="more than 0",
            )  # fmt: skip

    @property
    def lossless(self) -> bool:
        """Is this what a cache does by itself?"""
        plain = bool((self.temperature == 1).all()) and bool((self.scale == 1).all())
        return plain and self.position == "shared"


@dataclass(frozen=True)
class Read(Record):
    """Which entries a decode step touches: the best units of the bulk, besides sinks and recent entries.

    budget: fp32 [L]: entries of the bulk that are read, as a share of the bulk when ≤ 1, else a count.
    unit, form: entries that are chosen together: `unit` consecutive ones ("page"; 1: tokens), those of a k-means
        cluster of keys, `unit` on average ("cluster"), or those between two cuts, however many ("run"; `unit` of them
        join the bulk at a time). The last cluster or run that is chosen ends where the budget does.
    cut: where runs begin (see `cache/read/cuts.py`): after the "tokens" `ends` int32 [n]; or where "keys", or the
        "queries" of decode steps, have a cosine below `apart` fp32 [L] with those before. Clusters with a cut are made
        once, and what joins the bulk later are runs.
    summary: what stands for a unit (see `cache/read/summaries/`); `table` is what it was calibrated with, [L,K,...],
        `rank` how many of its columns, or of the head's channels, it looks at (0: all), and `bits` what it holds of
        each number (0: all).
    index: which units a query looks at, where it does not look at all (see `cache/read/indexes/`); `search` is what it
        needs to know, by the names that its file says.
    sink, recent: entries that are always read, besides. outliers: so many units, too, per KV head: those whose keys
        agree least with their mean (ShadowKV, section 3). exact: which are held as they came, too.
    query: what chooses: the step's "own" query; the mean of those since the "run" began; of the last `asked` queries,
        the mean of those that came "together", as a prompt's or a question's, after each of which a choice is made
        anew; or a "probe", in which those count most that differ from what is `usual`, the mean and variance by channel
        fp32 [L,K,G,2,D], of all that came before if that is not told (see `cache/read/asking.py`).
    bare: queries and keys are compared as they are before RoPE. cosine: whatever the length of what stands for a unit.
    heads: how the G query heads of a KV head agree on one choice: "max", "mean" or "sum" of their scores, made
        probabilities over units first if `softmax`; all heads that are held alike, by the mean over the "layer"; or
        "each" chooses by itself, and the union is read.
    period, jump: a choice is made anew after `period` steps (0: never for its age), and as soon as the cosine between
        the query and the one that chose, averaged over the heads that choose together, is below `jump`. Units that
        have joined the bulk since are read too.
    renew, whole: with a cut, a choice is made anew where a run begins, too; and the first `whole` steps of a run read
        everything.
    owner: int32 [L]: the layer whose scores a layer goes by, itself (the default) or an earlier one that goes by its
        own. A layer of budget 1 reads everything, and may be an owner.
    tail: what becomes of the entries that are not read. "drop"; "mean": the share of attention that the scores give
        them goes to the mean value of the bulk (SparF); "estimate": the best `estimated` of all units among them
        take part with their mean value, as many entries of the summary's logit.
    positions: where a query meets what it reads: at the entries' "original" distance; as if nothing stood between what
        is read, which is "contiguous" with the recent entries; or "far", `recent` tokens away (see
        `cache/read/places.py`).
    page: entries that memory hands out at once; bytes read are counted in whole pages.
    slow: the bulk of layers with a budget lives in host memory, and what is read is fetched from there.
    documents: how documents take part that other caches hold.
    prefill: what a prompt's queries read while it is fed. None: everything.
    """

    budget: torch.Tensor
    unit: int = 16
    form: Literal["page", "cluster", "run"] = "page"
    cut: Literal["tokens", "keys", "queries"] | None = None
    ends: torch.Tensor | None = None
    apart: torch.Tensor | None = None
    summary: str = "minmax"
    table: torch.Tensor | None = None
    rank: int = 0
    bits: int = 0
    index: str | None = None
    search: dict[str, Any] = field(default_factory=dict)
    sink: int = 0
    recent: int = 0
    outliers: int = 0
    exact: bool = False
    query: Literal["own", "run", "together", "probe"] = "own"
    asked: int = 32
    usual: torch.Tensor | None = None
    bare: bool = False
    cosine: bool = False
    heads: Literal["max", "mean", "sum", "layer", "each"] = "max"
    softmax: bool = False
    period: int = 1
    jump: float | None = None
    renew: bool = False
    whole: int = 0
    owner: torch.Tensor | None = None
    tail: Literal["drop", "mean", "estimate"] = "drop"
    estimated: float = 1.0
    positions: Literal["original", "contiguous", "far"] = "original"
    page: int = 1
    slow: bool = False
    documents: Documents | None = None
    prefill: Prefill | None = None

    def __post_init__(self) -> None:
        counts = (self.rank, self.bits, self.outliers, self.period, self.sink, self.recent, self.whole)
        if min(self.unit, self.page) < 1 or min(counts) < 0:
            raise InputError("bad reading", got=self, expected="unit, page >= 1 and no negative count")
        if bool((self.budget <= 0).any()):
            raise InputError("bad budget", got=float(self.budget.min()), expected="more than 0")
        if self.outliers and self.form != "page":
            raise InputError("outliers are pages", got=f"units of the form {self.form!r}")
        self._check_cut()
        self._check_index()
        self._check_query()
        if self.owner is not None:
            layers = torch.arange(len(self.budget))
            if bool((self.owner[self.owner.long()] != self.owner).any()) or bool((self.owner > layers).any()):
                raise InputError(
                    "bad owners", got=self.owner.tolist(), expected="itself or an earlier layer that is its own owner"
                )

    def _check_cut(self) -> None:
        if self.cut is None:
            if self.form == "run" or self.renew or self.whole or self.query == "run":
                raise InputError("runs need a cut", got=f"form {self.form!r} without one")
            return
        needed = "ends" if self.cut == "tokens" else "apart"
        if getattr(self, needed) is None:
            raise InputError(f"a cut by {self.cut} needs {needed!r}")
        if self.owner is not None:
            raise InputError("layers that go by the choice of another cannot have runs of their own")
        if self.form != "page" and self.tail == "estimate" and self.estimated < 1:
            raise InputError(
                "runs are estimated all or not at all", got=f"estimated {self.estimated}", expected="estimated 1"
            )

    def _check_index(self) -> None:
        if self.index is None:
            return
        rule = registry.module("cache/read/indexes", self.index, "index")
        if set(self.search) != set(rule.SETTINGS):
            raise InputError(
                f"the index {self.index!r} needs to know other things", got=sorted(self.search), expected=rule.SETTINGS
            )
        if self.unit > 1 and not rule.PAGES:
            raise InputError(f"the index {self.index!r} finds single entries", got=f"unit {self.unit}")
        if self.heads not in ("each", "max") and not rule.PAGES:
            raise InputError(
                "query heads look at entries of their own, whose scores have no mean", got=f"heads {self.heads!r}",
                expected="each or max",
            )  # fmt: skip
        whole = self.form != "page" or self.tail != "drop" or self.cut or self.softmax or self.cosine
        if whole or self.bare or self.query != "own" or self.heads == "layer" or self.positions != "original":
            raise InputError(
                "what an index leaves out has no score", got=f"form {self.form!r}, tail {self.tail!r}",
                expected="pages or tokens as they stand, each head's own queries, no cut, no softmax and no tail",
            )  # fmt: skip

    def _check_query(self) -> None:
        if self.asked < 1:
            raise InputError("bad reading", got=f"asked {self.asked}", expected="1 or more queries")
        if self.bare and (self.form == "cluster" or self.query == "run" or self.tail != "drop"):
            raise InputError(
                "scores before RoPE are no logits", got=f"form {self.form!r}, query {self.query!r}, tail {self.tail!r}",
                expected="pages or runs, another query than a run's, and no tail",
            )  # fmt: skip
        if self.heads == "layer" and not (self.form == "page" or (self.form == "run" and self.cut == "tokens")):
            raise InputError("heads that choose together need the same units", expected="pages, or runs cut by tokens")
        if self.positions != "original" and self.tail != "drop":
            raise InputError(
                "what is not read has logits at its own distance only",
                got=f"positions {self.positions!r}, tail {self.tail!r}",
                expected="positions original, or tail drop",
            )  # fmt: skip

    @property
    def block(self) -> int:
        """Entries that join the bulk together."""
        return self.unit * int(self.search.get("coarse", 1))

    @property
    def lossless(self) -> bool:
        return not self.chooses and all(part is None or part.lossless for part in (self.documents, self.prefill))

    @property
    def chooses(self) -> bool:
        """Is there a layer whose decode steps do not read everything?"""
        return not bool((self.budget == 1.0).all())

    @property
    def asked_together(self) -> bool:
        """Is a question to come in one piece, for what it asks to be read?"""
        return self.chooses and self.query == "together"

    @property
    def waits(self) -> bool:
        """Does it matter where a prompt ends?"""
        return self.asked_together or (self.chooses and self.form == "cluster")

    @property
    def sparse(self) -> bool:
        """Do a prompt's queries not read everything?"""
        return self.prefill is not None and not self.prefill.lossless

    def then(self, other: Read) -> Read | None:
        """What both say of decode steps, of documents, and of a prompt's queries; None if both say something of one of
        these: not what a cache does by itself, nor, of documents and prompts, the same."""
        if self.chooses and other.chooses:
            return None
        parts = {}
        for name in ("documents", "prefill"):
            mine, theirs = getattr(self, name), getattr(other, name)
            said = [part for part in (mine, theirs) if part is not None and not part.lossless]
            if len(said) > 1 and not alike(*said):
                return None
            parts[name] = said[0] if said else mine or theirs
        return replace(other if other.chooses else self, **parts)

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
        if keep.select is not None and self.positions == "contiguous":
            raise InputError(
                "what is read is moved together, but so it is where entries were dropped before the recent ones",
                remedy="compose with a plan that keeps every entry, or read at original positions",
            )
        if self.chooses and keep.select is not None and keep.select.when == "step":
            raise InputError(
                "entries are evicted one by one at every step, but they are read in units that do not change",
                remedy="compose with a plan that evicts once, after the prompt",
            )
