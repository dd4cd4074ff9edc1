"""Two levels of pages: the best pages of `coarse` units by their own summaries, and then units within these (MPCache,
arXiv 2501.06807).

SETTINGS: "coarse", units of an upper page; "share" of the upper pages in which units are looked at. There are enough of
them for the units that are read. What chooses units, each KV head or query head, chooses upper pages too. Held: the
summary of every upper page, of the same kind as those of units.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from kvtool.cache.read.indexes._base import Index, Reduced
from kvtool.cache.read.summaries._base import Parts
from kvtool.cache.read.units import Units
from kvtool.cache.segments import Segment
from kvtool.slots import Read

SETTINGS = ("coarse", "share")
PAGES = True
QUERIES = False


class Found(Index):
    shareable = True

    def __init__(self, spec: Read, units: Units):
        super().__init__(spec, units)
        self.shared: list[Parts] = []  # of upper pages that all rows share
        self.parts: Parts = ()  # of the others
        self.seen = 1.0  # the share of them that the last choice looked into

    def append(self, k: torch.Tensor) -> None:
        new = self.units.rule.summarise(k.unflatten(2, (-1, self.spec.block)), self.units.given)
        held = zip(self.parts, new, strict=True) if self.parts else ()
        self.parts = tuple(torch.cat(pair, 2) for pair in held) or new

    def scores(self, q: torch.Tensor, bulk: Segment, count: int, reduced: Reduced) -> torch.Tensor:
        each = [*self.shared, *([self.parts] if self.parts else [])]
        upper = reduced(self.units.scored(q, each))
        coarse, pages = self.search["coarse"], upper.shape[3]
        taken = min(pages, max(round(self.search["share"] * pages), -(-count // coarse)))
        self.seen = taken / pages
        inside = torch.zeros_like(upper, dtype=torch.bool).scatter(3, upper.topk(taken, dim=-1).indices, True)
        return self.units.scores(q, bulk).masked_fill(~inside.repeat_interleave(coarse, 3), float("-inf"))

    def looked_bytes(self, bulk: Segment) -> int:
        """Summaries of all upper pages, and of the units within those that were chosen."""
        return sum(part.nbytes for part in self.buffers()) + round(self.seen * self.units.summary_bytes())

    def branch(self, units: Units) -> Found:
        made = copy.copy(self)
        made.units, made.shared, made.parts = units, [*self.shared, *([self.parts] if self.parts else [])], ()
        return made

    def buffers(self) -> Iterator[torch.Tensor]:
        for parts in (*self.shared, self.parts):
            yield from parts

    def reorder(self, rows: torch.Tensor) -> None:
        self.parts = tuple(part[rows] for part in self.parts)
