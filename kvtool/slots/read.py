"""The slot read: which entries a query touches. L layers, K KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.errors import InputError
from kvtool.records import Record
from kvtool.slots.keep import Keep


@dataclass(frozen=True)
class Read(Record):
    """Which entries a decode step touches: the best units of the bulk, besides sinks and recent entries.

    budget: fp32 [L]: entries of the bulk that are read, as a share of the bulk when ≤ 1, else a count.
    unit, form: entries that are chosen together: `unit` consecutive ones ("page"; 1: tokens), those of a k-means
        cluster of keys, `unit` on average ("cluster"), or those between two cuts, however many ("run"; `unit` of them
        join the bulk at a time). The last cluster or run that is chosen ends where the budget does.
    cut: where runs begin (see `cache/cuts.py`): after the "tokens" `ends` int32 [n]; or where "keys", or the "queries"
        of decode steps, have a cosine below `apart` fp32 [L] with those before. Clusters with a cut are made once, and
        what joins the bulk later are runs.
    summary: what stands for a unit (see `cache/summaries/`); `table` is what it was calibrated with, [L,K,...], `rank`
        how many of its columns, or of the head's channels, it looks at (0: all), and `bits` what it holds of each
        number (0: all).
    sink, recent: entries that are always read, besides. outliers: so many units, too, per KV head: those whose keys
        agree least with their mean (ShadowKV, section 3). exact: which are held as they came, too.
    query: what chooses: the step's "own" query, or the mean of those since the "run" began.
    heads: how the G query heads of a KV head agree on one choice: "max", "mean" or "sum" of their scores, made
        probabilities over units first if `softmax`; or "each" chooses by itself, and the union is read.
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
    page: entries that memory hands out at once; bytes read are counted in whole pages.
    slow: the bulk of layers with a budget lives in host memory, and what is read is fetched from there.
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
    sink: int = 0
    recent: int = 0
    outliers: int = 0
    exact: bool = False
    query: Literal["own", "run"] = "own"
    heads: Literal["max", "mean", "sum", "each"] = "max"
    softmax: bool = False
    period: int = 1
    jump: float | None = None
    renew: bool = False
    whole: int = 0
    owner: torch.Tensor | None = None
    tail: Literal["drop", "mean", "estimate"] = "drop"
    estimated: float = 1.0
    page: int = 1
    slow: bool = False

    def __post_init__(self) -> None:
        counts = (self.rank, self.bits, self.outliers, self.period, self.sink, self.recent, self.whole)
        if min(self.unit, self.page) < 1 or min(counts) < 0:
            raise InputError("bad reading", got=self, expected="unit, page >= 1 and no negative count")
        if bool((self.budget <= 0).any()):
            raise InputError("bad budget", got=float(self.budget.min()), expected="more than 0")
        if self.outliers and self.form != "page":
            raise InputError("outliers are pages", got=f"units of the form {self.form!r}")
        self._check_cut()
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
