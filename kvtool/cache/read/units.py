"""The units of a bulk and what stands for them: pages, summarised as they come in; runs, which grow as they come in; or
clusters, made when first read.

Clusters are made of everything that joined the bulk since the last step: of the whole prompt at the first decode step,
however it was cut, and of each block after that, unless a cut makes runs of what comes later. Runs have numbers (see
`cuts.py`), which rows and heads reach at different times: a unit may be empty.

Shapes: B batch, K KV heads of the lane, G query heads of each, S entries of the bulk, U units, C choosers per KV head
(G if each query head chooses by itself, else 1); a choice is M of N elements: units if they are pages, else entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvtool import registry
from kvtool.cache.read.clusters import clustered, means
from kvtool.cache.read.summaries._base import Given, Parts
from kvtool.cache.segments import Segment
from kvtool.errors import InputError
from kvtool.slots import Read
from kvtool_kernels.precision import wide


class Units:
    """State is replaced, never written into: a shallow copy goes on by itself."""

    def __init__(self, spec: Read, given: Given):
        self.spec, self.given = spec, given
        self.rule = registry.module("cache/read/summaries", spec.summary, "summary")
        if spec.form != "page" and not hasattr(self.rule, "pooled"):
            raise InputError(f"the summary {spec.summary!r} cannot stand for a {spec.form}",
                             remedy="use mean or root-mean")  # fmt: skip
        if (spec.bare and hasattr(self.rule, "share")) or (spec.cosine and not hasattr(self.rule, "squares")):
            raise InputError(f"the summary {spec.summary!r} is no vector to compare before RoPE or by its direction",
                             remedy="use mean or attended")  # fmt: skip
        if spec.tail == "estimate" and not self.rule.LOGIT:
            raise InputError(f"the summary {spec.summary!r} does not estimate a logit", remedy="use mean")
        self.grain = spec.unit if spec.form == "page" else 1  # entries that one element of a choice stands for
        self.parts: Parts = ()
        self.values: torch.Tensor | None = None  # mean values of units [B,K,U,D], for the tail "estimate"
        self.total: torch.Tensor | None = None  # sum of all values, fp32 [B,K,1,D], for the tail "mean"
        self.labels: torch.Tensor | None = None  # clusters, runs: the unit of each entry, int32 [B,K,S]
        self.sizes: torch.Tensor | None = None  # clusters, runs: entries of each unit, int32 [B,K,U]
        self.means: torch.Tensor | None = None  # with a cut: mean keys of units [B,K,U,D], which `parts` are made from
        self.made = 0  # clusters that were made before the first run
        self.agreement: torch.Tensor | None = None  # the least cosine of a unit's keys with their mean, fp32 [B,K,U]
        self.rarest: torch.Tensor | None = None  # with `exact`: which units are held as they came, int64 [B,K,N]
        self.raw: tuple[torch.Tensor, ...] = ()  # their keys and values [B,K,N,unit,D]
        self.width = 0

    def append(
        self, k: torch.Tensor, v: torch.Tensor, runs: torch.Tensor | None = None, credit: torch.Tensor | None = None
    ) -> None:
        """Entries k, v [B,K,S,D], S a multiple of the unit, are about to join the bulk; runs int32 [B,K,S] are their
        numbers, where there is a cut, and credit [B,K,S] what they were attended, where the summary wants to know."""
        self.width = k.shape[3]
        self._place(k.device)
        if self.spec.tail == "mean":
            sums = wide(v).sum(2, keepdim=True)
            self.total = sums if self.total is None else self.total + sums
        if self.spec.form == "page":
            keys = k.unflatten(2, (-1, self.spec.unit))
            told = credit if credit is None else credit.unflatten(2, (-1, self.spec.unit))
            self._extend(self.rule.summarise(keys, replace(self.given, credit=told)))
            if self.spec.tail == "estimate":
                self.values = _joined(self.values, wide(v.unflatten(2, (-1, self.spec.unit))).mean(3).to(v.dtype))
            if self.spec.outliers:
                cosine = torch.cosine_similarity(wide(keys), wide(keys).mean(3, keepdim=True), dim=-1)
                self._agree(cosine.amin(-1), keys, v.unflatten(2, (-1, self.spec.unit)))
        elif runs is not None and (self.spec.form == "run" or self.labels is not None):
            self._grow(k, v, runs + self.made)

    def _place(self, device: torch.device) -> None:
        """The plan's table lies where the model is, also of units that came from a file."""
        if self.given.table is not None and self.given.table.device != device:
            self.given = replace(self.given, table=self.given.table.to(device))

    def _agree(self, least: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """New units k, v [B,K,U,unit,D] of the least cosines [B,K,U] have come; of all, the outliers are held."""
        known = 0 if self.agreement is None else self.agreement.shape[2]
        self.agreement = _joined(self.agreement, least)
        if not self.spec.exact:
            return
        new = torch.arange(known, known + k.shape[2], device=k.device).expand(k.shape[:3])
        number = new if self.rarest is None else torch.cat([self.rarest, new], 2)
        raw = [torch.cat([old, x], 2) for old, x in zip(self.raw, (k, v), strict=True)] if self.raw else [k, v]
        agreement = self.agreement.gather(2, number)
        best = agreement.topk(min(self.spec.outliers, number.shape[2]), dim=-1, largest=False).indices
        self.rarest = number.gather(2, best)
        self.raw = tuple(x.gather(2, best[..., None, None].expand(-1, -1, -1, *x.shape[3:])) for x in raw)

    def restored(self, read: torch.Tensor, x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Keys and values [B,K,C·M·unit,D] of the choice read [B,K,C,M], outliers as they came."""
        if self.rarest is None:
            return x
        same = read.flatten(2)[..., None] == self.rarest[:, :, None]  # [B,K,C·M,N]
        found, place = same.any(-1)[..., None, None], same.int().argmax(-1)[..., None, None]
        sides = []
        for side, raw in zip(x, self.raw, strict=True):
            units = side.unflatten(2, (-1, self.spec.unit))
            sides.append(torch.where(found, raw.gather(2, place.expand_as(units)), units).flatten(2, 3))
        return tuple(sides)

    def _grow(self, k: torch.Tensor, v: torch.Tensor, labels: torch.Tensor) -> None:
        """Entries join the runs labels int32 [B,K,S]."""
        held = 0 if self.sizes is None else self.sizes.shape[2]
        count = max(held, int(labels.max()) + 1)
        old = labels.new_zeros(*labels.shape[:2], count) if self.sizes is None else _room(self.sizes, count)
        self.sizes = old.scatter_add(2, labels.long(), torch.ones_like(labels))
        self.means = _grown(self.means, old, k, labels, self.sizes)
        if self.spec.tail == "estimate":
            self.values = _grown(self.values, old, v, labels, self.sizes)
        self.labels = _joined(self.labels, labels)

    def _extend(self, parts: Parts) -> None:
        old = self.parts or (None,) * len(parts)
        self.parts = tuple(_joined(held, new) for held, new in zip(old, parts, strict=True))

    def settle(self, bulk: Segment) -> None:
        """Cluster what joined the bulk since."""
        known = 0 if self.labels is None else self.labels.shape[2]
        if self.spec.form != "cluster" or known == bulk.length:
            return
        k, v = bulk.recall(known) if self.spec.tail == "estimate" else (bulk.keys(known), None)
        labels, sizes = clustered(k, self.spec.unit)
        if self.spec.cut is None:
            self._extend(self.rule.pooled(means(k, labels, sizes), sizes))
        else:
            self.means, self.made = means(k, labels, sizes), sizes.shape[2]
        if v is not None:
            self.values = _joined(self.values, means(v, labels, sizes))
        first = 0 if self.sizes is None else self.sizes.shape[2]
        self.labels, self.sizes = _joined(self.labels, labels + first), _joined(self.sizes, sizes)

    def scores(self, q: torch.Tensor, bulk: Segment) -> torch.Tensor:
        """q [B,K,G,D] → [B,K,G,U]; −inf for units that nothing belongs to."""
        self._place(q.device)
        if hasattr(self.rule, "share"):
            return self.rule.score(q, (bulk.keys().unflatten(2, (-1, self.spec.unit)),), self.given)
        parts = self.parts if self.means is None else self.rule.pooled(self.means, self.sizes)
        scores = self.rule.score(q, parts, self.given)
        return scores if self.sizes is None else scores.masked_fill(self.sizes[:, :, None] == 0, float("-inf"))

    def squares(self) -> torch.Tensor:
        """Squared lengths of what stands for the units, [B,K,U]."""
        return self.rule.squares(self.parts if self.means is None else self.rule.pooled(self.means, self.sizes))

    def elements(self, ranked: torch.Tensor) -> torch.Tensor:
        """Scores of units [B,K,C,U] → of what a choice is made of, [B,K,C,N]."""
        return ranked if self.labels is None else ranked.gather(3, self._over(self.labels, ranked.shape[2]))

    def best(self, ranked: torch.Tensor, count: int) -> torch.Tensor:
        """The choice [B,K,C,count] of largest scores ranked [B,K,C,N], the last first."""
        if self.spec.form == "page":
            index = ranked.topk(count, dim=-1).indices
        else:  # entries of one unit are tied, and the first ones go first
            index = ranked.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return index.sort(-1, descending=True).values

    def apart(self, ranked: torch.Tensor) -> torch.Tensor:
        """Scores ranked [B,K,C,U] in which outliers come first."""
        if self.agreement is None:
            return ranked
        count = min(self.spec.outliers, ranked.shape[3])
        least = self.agreement.topk(count, dim=-1, largest=False).indices if self.rarest is None else self.rarest
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
        return sum(part.nbytes for part in self.parts) + (0 if self.means is None else self.means.nbytes)

    def exact_bytes(self) -> int:
        """Bytes of the outliers that are held as they came."""
        return sum(x.nbytes for x in self.raw)

    def tail_bytes(self) -> int:
        """Bytes of values that stand for what is not read."""
        estimated = 0 if self.values is None else round(self.values.nbytes * self.spec.estimated)
        return estimated + (0 if self.total is None else self.total.nbytes)

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.parts
        yield from self.raw
        for held in (self.means, self.values, self.total, self.labels, self.sizes, self.agreement, self.rarest):
            if held is not None:
                yield held

    def reorder(self, rows: torch.Tensor) -> None:
        self.parts, self.raw = (tuple(part[rows] for part in parts) for parts in (self.parts, self.raw))
        for name in ("means", "values", "total", "labels", "sizes", "agreement", "rarest"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows])


def _room(held: torch.Tensor, count: int) -> torch.Tensor:
    """held [B,K,U,...] with zeros up to `count` units."""
    more = held.new_zeros(*held.shape[:2], count - held.shape[2], *held.shape[3:])
    return torch.cat([held, more], 2) if more.shape[2] else held


def _grown(
    held: torch.Tensor | None, old: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Means held of units of the sizes old [B,K,U], after x [B,K,S,D] joined the units labels [B,K,S]."""
    start = x.new_zeros(*sizes.shape, x.shape[3]) if held is None else _room(held, sizes.shape[2])
    sums = wide(start) * old[..., None]
    sums = sums.scatter_add(2, labels.long()[..., None].expand_as(x), x.to(sums.dtype))
    mean = (sums / sizes[..., None].clamp_min(1)).to(start.dtype)
    return torch.where((sizes > old)[..., None], mean, start)


def _joined(held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if held is None else torch.cat([held, new], dim=2)
