"""What ranks the units of a bulk, as a plan that reads selectively would rank them: units, summaries and indexes of
`kvtool/cache/read/` themselves, under a number of queries that all choose from the same entries.

    scores of a KV head's query heads → softmax over units → mean over these heads; an index may pass units by, which
    then have no weight

Settings of summaries and indexes are the defaults of the methods that have them. Channels and bases are the text's own,
better than calibrated ones would be, and runs begin where a key's cosine with the key before is among the lowest, one
of `unit`, so that runs have that length on average. A graph is made of the queries before the rows that choose, as of a
prompt's. `wide` is larger than the method's: the search then looks at a few more keys, in far fewer steps.

Shapes: K KV heads, G query heads of each, R rows that choose, S entries of the bulk, U units, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read import tails
from kvtool.cache.read.credits import credited
from kvtool.cache.read.indexes import _base as indexes
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.read.units import Units
from kvtool.cache.segments import Dense
from kvtool.slots import Read
from kvtool.statistics._base import States
from kvtool_kernels.precision import wide

PART = 8  # channels and dimensions: one of so many
KEYS, REACH = 4, 64  # keys that stand for a page, and tokens in which they are attended (ActQKV)
WEIGHT = 0.6  # of the maxima (MPCache)
TOGETHER = 8  # rows that search an index side by side
PAGES = {"coarse": 2, "share": 0.5}
CLUSTERS = {"entries": 16, "scan": 0.1}
GRAPH = {"queries": 512, "nearest": 32, "degree": 32, "ef": 128, "wide": 64}


@dataclass(frozen=True)
class Choice:
    """Units of a form and size, and the summary that ranks them; `narrow`: it looks at D / PART channels; `index`: of
    the units it looks at those alone that the index finds."""

    form: Literal["page", "cluster", "run"]
    unit: int
    summary: str
    narrow: bool = False
    index: str | None = None
    search: dict[str, Any] = field(default_factory=dict)


CHOICES: dict[str, Choice | None] = {  # None: the newest entries, whatever the query
    "recent": None,
    "token keys": Choice("page", 1, "keys"),
    "token own-channels": Choice("page", 1, "keys", narrow=True),
    "token channels": Choice("page", 1, "channels", narrow=True),
    "token low-rank": Choice("page", 1, "low-rank", narrow=True),
    "token clusters": Choice("page", 1, "keys", index="cluster", search=CLUSTERS),
    "token graph": Choice("page", 1, "keys", index="graph", search=GRAPH),
    "page-16 minmax": Choice("page", 16, "minmax"),
    "page-16 between": Choice("page", 16, "between"),
    "page-16 between-pages": Choice("page", 16, "between", index="pages", search=PAGES),
    "page-16 mean": Choice("page", 16, "mean"),
    "page-16 attended": Choice("page", 16, "attended"),
    "page-64 minmax": Choice("page", 64, "minmax"),
    "page-64 mean": Choice("page", 64, "mean"),
    "run-16 mean": Choice("run", 16, "mean"),
    "run-16 root-mean": Choice("run", 16, "root-mean"),
    "cluster-16 mean": Choice("cluster", 16, "mean"),
    "cluster-16 root-mean": Choice("cluster", 16, "root-mean"),
}


class Ranking:
    """How the rows from `first` on rank the units of the entries from `low` to before `end`."""

    def __init__(self, view: States, choice: Choice, first: int, low: int, end: int):
        k, v = (x[None, :, low:end].float() for x in (view.k, view.v))
        q = view.q.float().unflatten(0, (len(view.k), -1))  # [K,G,T,D]
        self.step = Step(0, view.scale, view.softcap)
        self.q = q[:, :, first:].permute(2, 0, 1, 3)  # [R,K,G,D]
        self.bulk = Dense()
        self.bulk.append(k, v)
        spec = Read(
            torch.ones(1), unit=choice.unit, form=choice.form,
            cut="keys" if choice.form == "run" else None, apart=torch.zeros(1) if choice.form == "run" else None,
            summary=choice.summary, index=choice.index, search=choice.search,
        )  # fmt: skip
        width = _width(choice, k.shape[3])
        self.units = Units(spec, Given(_table(choice.summary, q, k[0]), width))
        credit = None
        if choice.summary == "attended":
            credit = credited(q[None, :, :, :first], view.k.float()[None, :, :first], REACH, self.step)[:, :, low:end]
        self.units.append(k, v, _runs(k, choice.unit) if choice.form == "run" else None, credit)
        self.units.settle(self.bulk)
        self.index = indexes.made(spec, self.units)
        if self.index is not None:
            self.index.append(k)
            self.index.receive(q[None, :, :, :first].flatten(1, 2), view.k[None, :, :first].float(), self.step)

    def best(self, count: int) -> tuple[torch.Tensor, float]:
        """The choice of `count` elements int64 [K,R,count], and the bytes looked at for it ÷ the entries' own."""
        ranked, looked = self._everything if self.index is None else self._found(count)
        return self.units.best(self.units.elements(ranked), count)[0], looked

    @cached_property
    def _everything(self) -> tuple[torch.Tensor, float]:
        """What the rows make of all units, [1,K,R,U]."""
        rows, kv_heads, group, _ = self.q.shape
        q = self.q.permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, -1)
        scores = self.units.scores(q, self.bulk).unflatten(2, (group, rows))
        looked = self.units.looked_bytes(self.bulk, group, whole=False)
        return self._shares(scores).mean(2), looked / self.bulk.read_bytes()

    def _found(self, count: int) -> tuple[torch.Tensor, float]:
        """What the rows make of those that the index shows them, each row for itself."""
        assert self.index is not None
        held, ranked, looked = self.bulk.keys().shape[0], [], 0.0
        for q in self.q.split(TOGETHER):
            self._spread(len(q), held)
            scores = self.index.scores(q, self.bulk, count, lambda units: self._shares(units).mean(2, keepdim=True))
            ranked.append(self._shares(scores).mean(2))
            looked += len(q) * self.index.looked_bytes(self.bulk) / self.bulk.read_bytes()
            held = len(q)
        return torch.cat(ranked).transpose(0, 1)[None], looked / len(self.q)

    def _spread(self, rows: int, held: int) -> None:
        """The same entries for so many rows of a batch, of which `held` are there."""
        if self.index is None or rows == held:
            return
        index = torch.zeros(rows, dtype=torch.int64, device=self.q.device)
        for part in (self.bulk, self.units, self.index):
            part.reorder(index)

    def _shares(self, scores: torch.Tensor) -> torch.Tensor:
        return tails.capped(scores, self.step).softmax(-1)


def _width(choice: Choice, channels: int) -> int:
    """What the summary is told to look at, 0: everything."""
    return KEYS if choice.summary == "attended" else max(1, channels // PART) if choice.narrow else 0


def _table(summary: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """What a summary is calibrated with: the text's own channels in order of their products, or basis of its keys k
    [K,S,D], and queries q [K,G,T,D]; or a weight."""
    if summary == "channels":
        return (q.abs().mean((1, 2)) * k.abs().mean(1)).argsort(dim=-1, descending=True)
    if summary == "low-rank":
        return torch.linalg.eigh(k.mT @ k).eigenvectors.flip(-1)
    return torch.full((len(k), 1), WEIGHT, device=k.device) if summary == "between" else None


def _runs(k: torch.Tensor, unit: int) -> torch.Tensor:
    """The run of each of the keys k [1,K,S,D], int32 [1,K,S]: as many as there are pages of `unit` keys."""
    near = torch.cosine_similarity(wide(k[:, :, :-1]), wide(k[:, :, 1:]), dim=-1)
    begins = torch.zeros(k.shape[:3], dtype=torch.int32, device=k.device)
    lowest = near.topk(max(0, k.shape[2] // unit - 1), dim=-1, largest=False).indices
    return begins.scatter(2, lowest + 1, 1).cumsum(-1, dtype=torch.int32)
