"""The units of a bulk and what stands for them: pages, summarised as they come in, or clusters, made when first read.

Clusters are made of everything that joined the bulk since the last step: of the whole prompt at the first decode step,
however it was cut, and of each block after that.

Shapes: B batch, K KV heads of the lane, G query heads of each, S entries of the bulk, U units, C choosers per KV head
(G if each query head chooses by itself, else 1); a choice is M of N elements: units if they are pages, else entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvtool import registry
from kvtool.cache.clusters import clustered, means
from kvtool.cache.segments import Segment
from kvtool.cache.summaries._base import Given, Parts
from kvtool.errors import InputError
from kvtool.slots import Read
from kvtool_kernels.precision import wide


class Units:
    """State is replaced, never written into: a shallow copy goes on by itself."""

    def __init__(self, spec: Read, given: Given):
        self.spec, self.given = spec, given
        self.rule = registry.module("cache/summaries", spec.summary, "summary")
        if spec.form == "cluster" and not hasattr(self.rule, "pooled"):
            raise InputError(f"the summary {spec.summary!r} cannot stand for a cluster", remedy="use mean or root-mean")
        if spec.tail == "estimate" and not self.rule.LOGIT:
            raise InputError(f"the summary {spec.summary!r} does not estimate a logit", remedy="use mean")
        self.grain = spec.unit if spec.form == "page" else 1  # entries that one element of a choice stands for
        self.parts: Parts = ()
        self.values: torch.Tensor | None = None  # mean values of units [B,K,U,D], for the tail "estimate"
        self.total: torch.Tensor | None = None  # sum of all values, fp32 [B,K,1,D], for the tail "mean"
        self.labels: torch.Tensor | None = None  # clusters: the unit of each entry, int32 [B,K,S]
        self.sizes: torch.Tensor | None = None  # clusters: entries of each unit, int32 [B,K,U]
        self.agreement: torch.Tensor | None = None  # the least cosine of a unit's keys with their mean, fp32 [B,K,U]
        self.width = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Entries k, v [B,K,S,D], S a multiple of the unit, are about to join the bulk."""
        self.width = k.shape[3]
        if self.given.table is not None and self.given.table.device != k.device:
            self.given = replace(self.given, table=self.given.table.to(k.device))
        if self.spec.tail == "mean":
            sums = wide(v).sum(2, keepdim=True)
            self.total = sums if self.total is None else self.total + sums
        if self.spec.form == "page":
            keys = k.unflatten(2, (-1, self.spec.unit))
            self._extend(self.rule.summarise(keys, self.given))
            if self.spec.tail == "estimate":
                self.values = _joined(self.values, wide(v.unflatten(2, (-1, self.spec.unit))).mean(3).to(v.dtype))
            if self.spec.outliers:
                cosine = torch.cosine_similarity(wide(keys), wide(keys).mean(3, keepdim=True), dim=-1)
                self.agreement = _joined(self.agreement, cosine.amin(-1))

    def _extend(self, parts: Parts) -> None:
        old = self.parts or (None,) * len(parts)
        self.parts = tuple(_joined(held, new) for held, new in zip(old, parts, strict=True))

    def settle(self, bulk: Segment) -> None:
        """Cluster what joined the bulk since."""
        known = 0 if self.labels is None else self.labels.shape[2]
        if self.spec.form == "page" or known == bulk.length:
            return
        k, v = bulk.recall(known) if self.spec.tail == "estimate" else (bulk.keys(known), None)
        labels, sizes = clustered(k, self.spec.unit)
        self._extend(self.rule.pooled(means(k, labels, sizes), sizes))
        if v is not None:
            self.values = _joined(self.values, means(v, labels, sizes))
        first = 0 if self.sizes is None else self.sizes.shape[2]
        self.labels, self.sizes = _joined(self.labels, labels + first), _joined(self.sizes, sizes)

    def scores(self, q: torch.Tensor, bulk: Segment) -> torch.Tensor:
        """q [B,K,G,D] → [B,K,G,U]; −inf for clusters that nothing belongs to."""
        if hasattr(self.rule, "share"):
            return self.rule.score(q, (bulk.keys().unflatten(2, (-1, self.spec.unit)),), self.given)
        scores = self.rule.score(q, self.parts, self.given)
        return scores if self.sizes is None else scores.masked_fill(self.sizes[:, :, None] == 0, float("-inf"))

    def elements(self, ranked: torch.Tensor) -> torch.Tensor:
        """Scores of units [B,K,C,U] → of what a choice is made of, [B,K,C,N]."""
        return ranked if self.labels is None else ranked.gather(3, self._over(self.labels, ranked.shape[2]))

    def best(self, ranked: torch.Tensor, count: int) -> torch.Tensor:
        """The choice [B,K,C,count] of largest scores ranked [B,K,C,N], the last first."""
        if self.spec.form == "page":
            index = ranked.topk(count, dim=-1).indices
        else:  # entries of one cluster are tied, and the first ones go first
            index = ranked.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return index.sort(-1, descending=True).values

    def apart(self, ranked: torch.Tensor) -> torch.Tensor:
        """Scores ranked [B,K,C,U] in which outliers come first."""
        if self.agreement is None:
            return ranked
        count = min(self.spec.outliers, ranked.shape[3])
        least = self.agreement.topk(count, dim=-1, largest=False).indices
        return ranked.scatter(3, self._over(least, ranked.shape[2]), float("inf"))

    def unread(self, choice: torch.Tensor, units: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of each unit that a choice [B,K,C,M] (−1: nothing) leaves, and the units' sizes, [B,K,C,U]."""
        chosen, places = (choice >= 0).long() * self.grain, choice.clamp_min(0)
        if self.labels is None or self.sizes is None:
            sizes = torch.full((*choice.shape[:3], units), self.grain, device=choice.device)
        else:
            places = self._over(self.labels, choice.shape[2]).gather(3, places)
            sizes = self._over(self.sizes, choice.shape[2])
        return sizes - torch.zeros_like(sizes).scatter_add(3, places, chosen), sizes

    def _over(self, x: torch.Tensor, choosers: int) -> torch.Tensor:
        """int [B,K,N] → int64 [B,K,C,N]."""
        return x.long()[:, :, None].expand(-1, -1, choosers, -1)

    def looked_bytes(self, bulk: Segment, group: int, *, whole: bool) -> int:
        """Bytes read to score every unit; keys that are read anyway cost nothing more."""
        if hasattr(self.rule, "share"):
            return 0 if whole else round(self.rule.share(self.given, self.width, group) * bulk.key_bytes())
        return sum(part.nbytes for part in self.parts)

    def tail_bytes(self) -> int:
        """Bytes of values that stand for what is not read."""
        estimated = 0 if self.values is None else round(self.values.nbytes * self.spec.estimated)
        return estimated + (0 if self.total is None else self.total.nbytes)

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.parts
        for held in (self.values, self.total, self.labels, self.sizes, self.agreement):
            if held is not None:
                yield held

    def reorder(self, rows: torch.Tensor) -> None:
        self.parts = tuple(part[rows] for part in self.parts)
        for name in ("values", "total", "labels", "sizes", "agreement"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows])


def _joined(held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if held is None else torch.cat([held, new], dim=2)
