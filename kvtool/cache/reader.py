"""Reading only what a query needs: units of the bulk, summarised when they come in, scored and chosen at decode.

A `Reader` belongs to one lane. It holds the summaries and the last choice; entries stay in the lane's bulk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool import registry
from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment
from kvtool.slots import Read
from kvtool_kernels.ops import attend


class Reader:
    """`budget`: entries of the bulk that one step reads, a share of it when ≤ 1."""

    def __init__(self, spec: Read, budget: float):
        self.spec, self.budget = spec, budget
        self.rule = registry.module("cache/summaries", spec.summary, "summary")
        self.clear()

    def clear(self) -> None:
        self.summary: tuple[torch.Tensor, ...] = ()
        self.choice: torch.Tensor | None = None  # int64 [B,K,M] units, in order
        self.age = 0
        self.moved = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Summarise entries k, v [B,K,S,D], S a multiple of the unit, that join the bulk."""
        made = self.rule.summarise(k.unflatten(2, (-1, self.spec.unit)))
        self.summary = made if not self.summary else tuple(
            torch.cat(pair, dim=2) for pair in zip(self.summary, made, strict=True)
        )  # fmt: skip

    def units(self, bulk: Segment) -> int:
        """Units that one step reads of this bulk."""
        entries = self.budget * bulk.length if self.budget <= 1 else self.budget
        return min(bulk.length // self.spec.unit, max(1, round(entries / self.spec.unit)))

    def attend(self, q: torch.Tensor, bulk: Segment, step: Step) -> Partial:
        """Attend q [B,H,1,D] over the chosen units of the bulk."""
        count = self.units(bulk)
        if count * self.spec.unit == bulk.length:
            return bulk.attend(q, step)
        if self.choice is None or self.age >= self.spec.period or self.choice.shape[2] != count:
            self.choice, self.age = self._choose(q, count), 0
        self.age += 1
        k, v = bulk.gather(self.choice, self.spec.unit)
        if self.spec.slow:
            self.moved += bulk.read_bytes() * count * self.spec.unit // bulk.length
        return attend(q, k, v, **step.options)

    def _choose(self, q: torch.Tensor, count: int) -> torch.Tensor:
        kv_heads = self.summary[0].shape[1]
        scores = self.rule.score(q[:, :, 0].unflatten(1, (kv_heads, -1)), self.summary)
        scores = {"max": scores.amax, "mean": scores.mean, "sum": scores.sum}[self.spec.heads](2)
        return scores.topk(count, dim=-1).indices.sort(-1).values

    def read_bytes(self, bulk: Segment) -> int:
        """Summaries and the chosen units, whole."""
        if bulk.length == 0:
            return 0
        count = self.units(bulk)
        if count * self.spec.unit == bulk.length:
            return bulk.read_bytes()
        return sum(part.nbytes for part in self.summary) + bulk.read_bytes() * count * self.spec.unit // bulk.length

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.summary

    def reorder(self, rows: torch.Tensor) -> None:
        self.summary = tuple(part[rows] for part in self.summary)
        self.choice = None if self.choice is None else self.choice[rows]
