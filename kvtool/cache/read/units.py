"""The units of a bulk and what stands for them: pages, summarised as they come in; runs, which grow as they come in; or
clusters, made when first read.

Clusters are made of everything that joined the bulk since the last step: of the whole prompt at the first decode step,
however it was cut, and of each block after that, unless a cut makes runs of what comes later. Runs have numbers (see
`cuts.py`), which rows and heads reach at different times: a unit may be empty.

A branch of a shared prefix holds only the units from the first on that its own entries may join; those `before` are
the prefix's, of one row, and are scored for all rows at once. The few outliers that are held as they came are its own.

Shapes: B batch, K KV heads of the lane, G query heads of each, S entries of the bulk, U units, C choosers per KV head
(G if each query head chooses by itself, else 1); a choice is M of N elements: units if they are pages, else entries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kvtool import registry
from kvtool.cache.read.clusters import clustered, means
from kvtool.cache.read.summaries._base import Given, Parts
from kvtool.cache.segments import Segment
from kvtool.cache.share.folding import for_all, joined
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
        self.before: Units | None = None  # whose first units come before these
        self.first = 0  # how many of them

    def branch(self, unfinished: int | None) -> Units:
        """Units that go on from here and leave these alone, from the run `unfinished` on, where there are runs: later
        entries may join it."""
        made = copy.copy(self)
        if not any(True for _ in self.buffers()):
            return made
        count = self._count()
        made.before = copy.copy(self)
        made.before.rarest, made.before.raw = None, ()
        made.first = count if unfinished is None or self.spec.form == "page" else min(count, self.made + unfinished)
        made.parts, made.labels, made.total = (), None, None
        for name in ("means", "sizes", "values", "agreement"):
            held = getattr(self, name)
            rest = None if held is None else held[:, :, made.first - self.first :]
            setattr(made, name, None if rest is None or not rest.shape[2] else rest.clone())
        return made

    def _count(self) -> int:
        """Units, as far as something is held of them."""
        held = (*self.parts, self.sizes, self.agreement, self.values)
        return self.first + next((x.shape[2] for x in held if x is not None), 0)

    def _known(self) -> int:
        """Entries that have a unit, where that is not a page."""
        return (0 if self.before is None else self.before._known()) + (
            0 if self.labels is None else self.labels.shape[2]
        )

    def _each(self, name: str, count: int | None = None) -> list[torch.Tensor]:
        """What is held by unit under this name, of the first `count` units: the prefix's, and these' own."""
        found = [] if self.before is None else self.before._each(name, self.first)
        held = getattr(self, name)
        if held is not None:
            found.append(held if count is None else held[:, :, : count - self.first])
        return found

    def _every(self, name: str) -> torch.Tensor | None:
        """The same of all units, [B,K,U,…], or [1,K,U,…] where all are shared."""
        found = self._each(name)
        return joined(found) if found else None

    def _labels(self) -> torch.Tensor | None:
        """The unit of each entry, int32 [B,K,S] or [1,K,S], where that is not a page."""
        found = [held for held in (None if self.before is None else self.before._labels(), self.labels)
                 if held is not None]  # fmt: skip
        return joined(found) if found else None

    def summed(self) -> torch.Tensor:
        """The sum of all values, fp32 [B,K,1,D] or [1,K,1,D]."""
        found = [] if self.before is None else [self.before.summed()]
        found += [] if self.total is None else [self.total]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def valued(self) -> list[torch.Tensor]:
        """Mean values of all units, in order, [B,K,U_i,D] or [1,K,U_i,D] each."""
        return self._each("values")

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
        elif runs is not None and (self.spec.form == "run" or self._known()):
            self._grow(k, v, runs + self.made)

    def _place(self, device: torch.device) -> None:
        """The plan's table lies where the model is, also of units that came from a file."""
        if self.given.table is not None and self.given.table.device != device:
            self.given = replace(self.given, table=self.given.table.to(device))

    def _agree(self, least: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """New units k, v [B,K,U,unit,D] of the least cosines [B,K,U] have come; of all, the outliers are held."""
        known = self.first + (0 if self.agreement is None else self.agreement.shape[2])
        self.agreement = _joined(self.agreement, least)
        if not self.spec.exact:
            return
        new = torch.arange(known, known + k.shape[2], device=k.device).expand(k.shape[:3])
        number = new if self.rarest is None else torch.cat([self.rarest, new], 2)
        raw = [torch.cat([old, x], 2) for old, x in zip(self.raw, (k, v), strict=True)] if self.raw else [k, v]
        agreement = joined(self._each("agreement")).gather(2, number)
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
        own = labels - self.first
        held = 0 if self.sizes is None else self.sizes.shape[2]
        count = max(held, int(own.max()) + 1)
        old = own.new_zeros(*own.shape[:2], count) if self.sizes is None else _room(self.sizes, count)
        self.sizes = old.scatter_add(2, own.long(), torch.ones_like(own))
        self.means = _grown(self.means, old, k, own, self.sizes)
        if self.spec.tail == "estimate":
            self.values = _grown(self.values, old, v, own, self.sizes)
        self.labels = _joined(self.labels, labels)

    def _extend(self, parts: Parts) -> None:
        old = self.parts or (None,) * len(parts)
        self.parts = tuple(_joined(held, new) for held, new in zip(old, parts, strict=True))

    def settle(self, bulk: Segment) -> None:
        """Cluster what joined the bulk since."""
        known = self._known()
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
        first = self.first + (0 if self.sizes is None else self.sizes.shape[2])
        self.labels, self.sizes = _joined(self.labels, labels + first), _joined(self.sizes, sizes)

    def scores(self, q: torch.Tensor, bulk: Segment) -> torch.Tensor:
        """q [B,K,G,D] → [B,K,G,U]; −inf for units that nothing belongs to."""
        self._place(q.device)
        each: list[Parts]
        if hasattr(self.rule, "share"):
            each = [(k.unflatten(2, (-1, self.spec.unit)),) for k in bulk.apiece()]
        else:
            each = self._parts()
        scores = self.scored(q, each)
        sizes = self._every("sizes")
        return scores if sizes is None else scores.masked_fill(sizes[:, :, None] == 0, float("-inf"))

    def scored(self, q: torch.Tensor, each: Sequence[Parts]) -> torch.Tensor:
        """q [B,K,G,D] → [B,K,G,Σ U_i], of units whose parts [B,K,U_i,…], or [1,K,U_i,…] for all rows, these are."""
        found = [for_all(q, len(x[0]), lambda rows, x=x: self.rule.score(rows, x, self.given)) for x in each]  # type: ignore[misc]
        return found[0] if len(found) == 1 else torch.cat(found, 3)

    def _parts(self, count: int | None = None) -> list[Parts]:
        """Of the first `count` units: the prefix's, and these' own."""
        found = [] if self.before is None else self.before._parts(self.first)
        own = self.parts
        if self.means is not None and self.sizes is not None:
            own = self.rule.pooled(self.means, self.sizes)
        if own:
            found.append(own if count is None else tuple(part[:, :, : count - self.first] for part in own))
        return found

    def squares(self) -> torch.Tensor:
        """Squared lengths of what stands for the units, [B,K,U], or [1,K,U]."""
        return joined([self.rule.squares(parts) for parts in self._parts()])

    def elements(self, ranked: torch.Tensor) -> torch.Tensor:
        """Scores of units [B,K,C,U] → of what a choice is made of, [B,K,C,N]."""
        labels = self._labels()
        return ranked if labels is None else ranked.gather(3, self._over(labels, ranked))

    def best(self, ranked: torch.Tensor, count: int) -> torch.Tensor:
        """The choice [B,K,C,count] of largest scores ranked [B,K,C,N], the last first."""
        if self.spec.form == "page":
            index = ranked.topk(count, dim=-1).indices
        else:  # entries of one unit are tied, and the first ones go first
            index = ranked.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return index.sort(-1, descending=True).values

    def apart(self, ranked: torch.Tensor) -> torch.Tensor:
        """Scores ranked [B,K,C,U] in which outliers come first."""
        agreement = self._every("agreement")
        if agreement is None:
            return ranked
        count = min(self.spec.outliers, ranked.shape[3])
        least = agreement.topk(count, dim=-1, largest=False).indices if self.rarest is None else self.rarest
        return ranked.scatter(3, self._over(least, ranked), float("inf"))

    def unread(self, choice: torch.Tensor, units: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of each unit that a choice [B,K,C,M] (−1: nothing) leaves, and the units' sizes, [B,K,C,U]."""
        chosen, places = (choice >= 0).long() * self.grain, choice.clamp_min(0)
        labels, held = self._labels(), self._every("sizes")
        if labels is None or held is None:
            sizes = torch.full((*choice.shape[:3], units), self.grain, device=choice.device)
        else:
            places = self._over(labels, choice).gather(3, places)
            sizes = self._over(held, choice)
        return sizes - torch.zeros_like(sizes).scatter_add(3, places, chosen), sizes

    def _over(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """int [B,K,N] or [1,K,N] → int64 [B,K,C,N], of as many rows and choosers as `like` has."""
        return x.long()[:, :, None].expand(len(like), -1, like.shape[2], -1)

    def looked_bytes(self, bulk: Segment, group: int, *, whole: bool) -> int:
        """Bytes read to score every unit; keys that are read anyway cost nothing more."""
        if hasattr(self.rule, "share"):
            return 0 if whole else round(self.rule.share(self.given, self.width, group) * bulk.key_bytes())
        return self.summary_bytes()

    def summary_bytes(self) -> int:
        """Bytes of what stands for the units, once where rows share it."""
        shared = 0 if self.before is None else self.before.summary_bytes()
        return shared + sum(part.nbytes for part in self.parts) + (0 if self.means is None else self.means.nbytes)

    def exact_bytes(self) -> int:
        """Bytes of the outliers that are held as they came."""
        return sum(x.nbytes for x in self.raw)

    def tail_bytes(self) -> int:
        """Bytes of values that stand for what is not read."""
        shared = 0 if self.before is None else self.before.tail_bytes()
        estimated = 0 if self.values is None else round(self.values.nbytes * self.spec.estimated)
        return shared + estimated + (0 if self.total is None else self.total.nbytes)

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.before is not None:
            yield from self.before.buffers()
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
