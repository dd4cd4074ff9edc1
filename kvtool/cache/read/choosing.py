"""Who of a lane's choosers chooses anew at a step, by which scores, and what is read then.

    due if none was made yet, or `period` steps ago, or the query jumped, a run began, a question came; or as the leader
    due → the `count` best elements by the scores;  else → the choice that stands, and what joined the bulk since

Choices are made per row and KV head, or per query head, so that neither the rest of the batch nor the other heads of
the lane matter. What followers need stands on the board. Shapes: as in `choices.py`.
"""

from __future__ import annotations

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.asking import Asking
from kvtool.cache.read.board import Place, Post
from kvtool.cache.read.choices import agreed, either, extended
from kvtool.cache.read.cuts import Cuts
from kvtool.cache.read.indexes import _base as indexes
from kvtool.cache.read.places import Places
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.read.units import Units
from kvtool.cache.segments import Segment
from kvtool.slots import Read
from kvtool_kernels.precision import wide


class Choosing:
    """Abstract: what is chosen from, and the last choice. State is replaced, never written into."""

    def __init__(self, spec: Read, place: Place):
        self.spec, self.place = spec, place
        self.budget = float(spec.budget[place.layer])
        self.leader = spec.leader(place.layer)
        self.leads, self.follows = len(spec.followers(place.layer)), self.leader != place.layer
        table, usual = (None if x is None else _of(x[place.layer], place.heads) for x in (spec.table, spec.usual))
        self.units = Units(spec, Given(table, spec.rank, spec.bits))
        self.cuts = None if spec.cut is None else Cuts(spec, place.layer)
        self.places = Places(spec, place.rotary)
        makes = spec.bare or spec.query in ("together", "probe")
        self.asking = Asking(spec, usual, self.places) if makes else None
        self.scores_itself = not self.follows or spec.tail != "drop"
        self.index = indexes.made(spec, self.units) if self.scores_itself else None
        self.choice: torch.Tensor | None = None  # int64 [B,K,C,M], the last first; −1 where a chooser has fewer
        self.age: torch.Tensor | None = None  # steps since each choice, −1 before the first, int64 [B,K,C]
        self.young: torch.Tensor | None = None  # who read everything at the last step, bool [B,K], if only some did
        self.asked: torch.Tensor | None = None  # the queries that chose [B,K,G,D], where `jump` compares with them
        self.known = 0  # elements of the bulk that the choice was made from, or extended by
        self.reads = self.asks = self.looks = 0  # steps; choosers in all of them, and those that chose anew

    def count(self, bulk: Segment) -> int:
        """Elements that a chooser reads of this bulk."""
        entries = self.budget * bulk.length if self.budget <= 1 else self.budget
        wanted = max(1, round(entries / self.units.grain)) + self.spec.outliers
        return min(bulk.length // self.units.grain, wanted)

    def _asked(
        self, q: torch.Tensor, scores: torch.Tensor | None, bulk: Segment, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which choosers are due, bool [B,K,C]; and if any, the scores of all elements [B,K,C,N]."""
        due, ranked = self._due(q), None
        if bool(due.any()):
            if self.cuts is not None and self.spec.query == "run":
                scores = self.units.scores(self.cuts.mean(q), bulk)
            if self.asking is not None:
                scores = self.units.scores(self.asking.query(q, step), bulk)
            if self.index is not None:
                scores = self.index.scores(q, bulk, self.count(bulk), lambda units: self._ranked(units, step))
            scores = self.units.scores(q, bulk) if scores is None else scores
            ranked = self.units.elements(self.units.apart(self._ranked(scores, step)))
            if self.spec.jump is not None:
                self.asked = q.clone() if self.asked is None else torch.where(due[..., None], q, self.asked)
        self.looks, self.asks = self.looks + int(due.sum()), self.asks + due.numel()
        for at, head in enumerate(self.place.heads if self.leads else ()):
            post: Post = (due[:, at], None if ranked is None else ranked[:, at])
            self.place.board.post((self.place.part, self.place.layer, head, self.reads), self.leads, post)
        return due, ranked

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same from the layer that this one goes by."""
        posts = [self.place.board.take((self.place.part, self.leader, head, self.reads)) for head in self.place.heads]
        due = torch.stack([due for due, _ in posts], 1)
        some = next((scores for _, scores in posts if scores is not None), None)
        if some is None:
            return due, None  # a head of which nobody is due may still stand beside one of which somebody is
        return due, torch.stack([torch.zeros_like(some) if scores is None else scores for _, scores in posts], 1)

    def _due(self, q: torch.Tensor) -> torch.Tensor:
        choosers = q.shape[2] if self.spec.heads == "each" else 1
        if self.choice is None or self.age is None:
            self.age = torch.full((*q.shape[:2], choosers), -1, device=q.device)
        due = (self.age < 0) | (self.age >= (self.spec.period or torch.iinfo(torch.int64).max))
        if self.spec.jump is not None and self.asked is not None:
            cosine = torch.cosine_similarity(wide(q), wide(self.asked), dim=-1)
            due = due | (cosine.unflatten(2, (choosers, -1)).mean(-1) < self.spec.jump)
        if self.spec.renew and self.cuts is not None:
            due = due | self.cuts.due(self.young)[..., None]
        if self.asking is not None and self.asking.fresh:
            due, self.asking.fresh = torch.ones_like(due), False
        return due if self.young is None else due & ~self.young[..., None]

    def _ranked(self, scores: torch.Tensor, step: Step) -> torch.Tensor:
        """Scores [B,K,G,U] per query head → [B,K,C,U] per chooser."""
        return agreed(scores, self.spec, self.units.squares() if self.spec.cosine else None, step)

    def _choose(self, due: torch.Tensor, ranked: torch.Tensor | None, count: int, total: int) -> bool:
        """Those who are due choose `count` of `total` elements; the others read on, and what is new too. Any change?"""
        grown, self.known = range(self.known, total), total
        self._grow_older(due)
        if ranked is None:
            assert self.choice is not None
            self.choice = extended(self.choice, grown)
            return len(grown) > 0
        fresh = self.units.best(ranked, count)
        if bool(due.all()):
            self.choice = fresh
            return True
        old = fresh[..., :0] if self.choice is None else extended(self.choice, grown)
        choice = either(due, fresh, old)
        self.choice = choice[..., : int((choice >= 0).sum(-1).max())].clone()
        return True

    def _grow_older(self, due: torch.Tensor) -> None:
        """Steps that read everything do not count, nor do any before the first choice."""
        if self.age is None or self.young is None:
            self.age = torch.where(due, 1, 1 if self.age is None else self.age + 1)
            return
        self.age = torch.where(due, 1, self.age + ((self.age >= 0) & ~self.young[..., None]))

    def _read(self, entries: int) -> torch.Tensor:
        """What is read: the choice, or all of so many elements, last first, where everything is."""
        assert self.choice is not None
        if self.young is None:
            return self.choice
        young = self.young[..., None].expand(self.choice.shape[:3])
        everything = torch.arange(entries, device=young.device).flip(0).expand(*young.shape, -1)
        return either(young, everything, self.choice)


def _of(x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Of x [K,...] the part of some KV heads; all need no copy."""
    return x if len(heads) == len(x) else x[list(heads)]
