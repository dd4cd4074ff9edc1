"""Reading only what a query needs: units of the bulk are scored and chosen, and attention sees the chosen ones alone.

    who is due? → scores of all units → a ranking per chooser, own or another layer's → the best → attend → tail

A `Reader` belongs to one lane. It holds the summaries (see `units.py`) and the last choice; entries stay in the
lane's bulk. A budget of everything is `bulk.attend`, bit for bit. Choices are made per row and KV head, or per query
head, so that neither the rest of the batch nor the other heads of the lane matter.

Where a choice is made anew when a run of entries begins, or read by its queries, `Cuts` follow the entries from when
they come. Bytes read are those of the last step: the chosen units' union, in whole pages, and the summaries as often as
they have been looked at on average so far. Shapes: as in `units.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.read import tails
from kvtool.cache.read.asking import Asking
from kvtool.cache.read.board import Board, Post
from kvtool.cache.read.choices import agreed, either, extended
from kvtool.cache.read.credits import Credits
from kvtool.cache.read.cuts import Cuts
from kvtool.cache.read.indexes import _base as indexes
from kvtool.cache.read.places import Places
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.read.units import Units
from kvtool.cache.segments import Dense, Segment
from kvtool.cache.share.shared import Shared
from kvtool.rotary import NONE, Rotary
from kvtool.slots import Read
from kvtool_kernels.ops import attend, merge
from kvtool_kernels.precision import wide


@dataclass(frozen=True)
class Place:
    """Whose reader it is: the part of the batch, the layer, the lane's KV heads, the cache's board, and RoPE."""

    part: int
    layer: int
    heads: tuple[int, ...]
    board: Board
    rotary: Rotary = NONE


class Reader:
    """State is replaced, never written into."""

    def __init__(self, spec: Read, place: Place):
        self.spec, self.place = spec, place
        self.budget = float(spec.budget[place.layer])
        self.leader = spec.leader(place.layer)
        self.leads, self.follows = len(spec.followers(place.layer)), self.leader != place.layer
        self.slow = spec.slow and self.budget != 1.0
        table, usual = (None if x is None else _of(x[place.layer], place.heads) for x in (spec.table, spec.usual))
        self.units = Units(spec, Given(table, spec.rank, spec.bits))
        self.cuts = None if spec.cut is None else Cuts(spec, place.layer)
        self.places = Places(spec, place.rotary)
        self.credits = Credits(spec.recent) if hasattr(self.units.rule, "CREDITS") else None
        makes = spec.bare or spec.query in ("together", "probe")
        self.asking = Asking(spec, usual, self.places) if makes else None
        self.joined = 0  # entries that have joined the bulk
        self.scores_itself = not self.follows or spec.tail != "drop"
        self.index = indexes.made(spec, self.units) if self.scores_itself else None
        self.choice: torch.Tensor | None = None  # int64 [B,K,C,M], the last first; −1 where a chooser has fewer
        self.age: torch.Tensor | None = None  # steps since each choice, −1 before the first, int64 [B,K,C]
        self.young: torch.Tensor | None = None  # who read everything at the last step, bool [B,K], if only some did
        self.asked: torch.Tensor | None = None  # the queries that chose [B,K,G,D], where `jump` compares with them
        self.fetched: tuple[torch.Tensor, ...] = ()  # what was read of a slow bulk, as long as it is read again
        self.known = 0  # elements of the bulk that the choice was made from, or extended by
        self.whole = False  # did the last step read everything?
        self.reads = self.asks = self.looks = 0  # steps; choosers in all of them, and those that chose anew
        self.group = 1  # query heads of a KV head

    def aside(self) -> Reader:
        """A reader of the same units that has read nothing yet."""
        made = copy.copy(self)
        made.choice = made.age = made.young = made.asked = None
        made.fetched, made.known, made.whole = (), 0, False
        made.reads = made.asks = made.looks = 0
        return made

    def branch(self) -> Reader:
        """A reader that goes on from here and leaves this one alone; summaries of what is there already are shared."""
        made = copy.copy(self)
        made.places = copy.copy(self.places)
        made.cuts, made.credits, made.asking = copy.copy(self.cuts), copy.copy(self.credits), copy.copy(self.asking)
        if made.asking is not None:
            made.asking.places = made.places
        made.units = self.units.branch(None if self.cuts is None else self.cuts.unfinished())
        made.index = None if self.index is None else self.index.branch(made.units)
        return made

    def settle(self, bulk: Segment, strict: bool) -> None:
        """The prompt is in: make of the bulk's entries what is made of all at once; what comes next is another one. A
        strict prompt was steps, which made what they needed: where it ends does not matter."""
        if self.scores_itself and bulk.length and not strict:
            self.units.settle(bulk)
        if self.asking is not None:
            self.asking.alone = True

    @property
    def watches(self) -> bool:
        """Does it follow the queries of decode steps?"""
        return any(part is not None for part in (self.cuts, self.credits, self.asking, self.index))

    def receive(self, q: torch.Tensor | None, k: torch.Tensor, step: Step, recent: torch.Tensor | None = None) -> None:
        """Entries with keys k [B,K,T,D] have come, the last of those that are recent [B,K,N,D], and q [B,H,≤T,D], where
        known, are the queries of the last of them."""
        if self.asking is not None:
            self.asking.receive(q, k, step)
        if self.credits is not None:
            self.credits.receive(q, k, k if recent is None else recent, step)
        if self.cuts is not None:
            self.cuts.receive(q, k, step)
        if self.index is not None:
            self.index.receive(q, k, step)

    def take(self, index: torch.Tensor) -> None:
        """Of the entries that came, all of them recent, only index int64 [B,K,N] are still there."""
        if self.cuts is not None:
            self.cuts.take(index)
        if self.credits is not None:
            self.credits.take(index)

    def skip(self, count: int) -> None:
        """The oldest `count` recent entries will not join the bulk."""
        if self.cuts is not None:
            self.cuts.leave(count)
        if self.credits is not None:
            self.credits.leave(count)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Entries k, v [B,K,S,D], S a multiple of the unit, are about to join the bulk."""
        runs = None if self.cuts is None else self.cuts.leave(k.shape[2])
        credit = None if self.credits is None else self.credits.leave(k.shape[2])
        first, self.joined = self.joined, self.joined + k.shape[2]
        if self.scores_itself:
            bare = self.places.bare(k, self.places.of(first, self.joined)) if self.spec.bare else k
            self.units.append(bare, v, runs, credit)
        if self.index is not None:
            self.index.append(k)

    def count(self, bulk: Segment) -> int:
        """Elements that a chooser reads of this bulk."""
        entries = self.budget * bulk.length if self.budget <= 1 else self.budget
        wanted = max(1, round(entries / self.units.grain)) + self.spec.outliers
        return min(bulk.length // self.units.grain, wanted)

    def attend(self, q: torch.Tensor, bulk: Segment, step: Step) -> Partial:
        """Attend q [B,H,1,D] over the chosen units of the bulk."""
        self.reads += 1
        count, total = self.count(bulk), bulk.length // self.units.grain
        self.whole = count == total and not self.spec.exact  # outliers are read as they came, whatever is read
        if self.whole and not self.leads and not self.follows:
            self.choice, self.fetched = None, ()
            return bulk.attend(q, step)
        grouped = q[:, :, 0].unflatten(1, (len(self.place.heads), -1))
        self.group = grouped.shape[2]
        if self.scores_itself:
            self.units.settle(bulk)
        self.young = None if self.cuts is None or not self.spec.whole else self.cuts.young(self.spec.whole)
        if self.young is not None and bool(self.young.all()):
            self.whole, self.fetched = True, ()
            return bulk.attend(q, step)
        scores = None if self.spec.tail == "drop" else self.units.scores(grouped, bulk)
        due, ranked = self._taken() if self.follows else self._asked(grouped, scores, bulk, step)
        changed = self._choose(due, ranked, count, total)
        if self.whole:
            self.fetched = ()
            return bulk.attend(q, step)
        out = self._over(self.places.query(grouped[..., None, :], step)[..., 0, :], bulk, step, changed=changed)
        if scores is not None:
            out = merge(out, self._tail(out, scores, bulk, step))
        return out[0].flatten(1, 2)[:, :, None], out[1].flatten(1, 2)[:, :, None]

    def before(self, q: torch.Tensor, sinks: Segment | Shared, step: Step) -> Partial:
        """Attend q [B,H,1,D], which has just attended over the bulk, over the sinks."""
        if self.spec.positions == "original" or self.whole or self.choice is None:
            return sinks.attend(q, step)
        unread = self.known - (self._read(self.known) >= 0).sum(-1)
        return self.places.before(q, sinks, unread * self.units.grain, step)

    # who chooses anew, by which scores

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

    # the choice, and attention over it

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

    def _over(self, q: torch.Tensor, bulk: Segment, step: Step, *, changed: bool) -> Partial:
        """q [B,K,G,D] over the choice → [B,K,G,D], [B,K,G]; choosers are rows of a batch with one KV head each."""
        read = self._read(bulk.length // self.units.grain)
        batch, kv_heads, choosers, _ = read.shape
        placed = self.spec.positions == "original"
        if choosers == 1 and placed and self.units.rarest is None and isinstance(bulk, Dense) and bulk.in_place():
            out, lse = bulk.attend_units(q.flatten(1, 2)[:, :, None], read[:, :, 0], self.units.grain, step)
            return out.reshape(q.shape), lse.reshape(q.shape[:3])
        if changed or self.young is not None or not self.fetched:
            k, v = self.units.restored(read, bulk.gather(read.clamp_min(0).flatten(2), self.units.grain))
            self.fetched = (self.places.keys(k, read, self.units.grain, bulk.length), v)
        k, v = (x.reshape(batch * kv_heads * choosers, 1, -1, x.shape[-1]) for x in self.fetched)
        if not self.slow or self.spec.period == 1 or self.young is not None:
            self.fetched = ()
        hidden, bias = read < 0, None
        if (self.spec.jump is not None or self.cuts is not None) and bool(hidden.any()):
            bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, float("-inf"))
            bias = bias.repeat_interleave(self.units.grain, 3).reshape(len(k), 1, 1, -1)
        out, lse = attend(q.reshape(len(k), -1, 1, q.shape[-1]), k, v, bias=bias, **step.options)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])

    def _tail(self, read: Partial, scores: torch.Tensor, bulk: Segment, step: Step) -> Partial:
        """The partial result [B,K,G,D], [B,K,G] that stands for what is not `read`."""
        unread, sizes = self.units.unread(self._read(bulk.length // self.units.grain), scores.shape[3])
        logits = tails.capped(scores, step)
        if self.spec.tail == "mean":
            value, lse = tails.mean(read[1], logits, unread, sizes, self.units.summed() / bulk.length)
        else:
            unread = tails.foremost(unread, self._ranked(scores, step), self.spec.estimated)
            value, lse = tails.estimate(logits, unread, self.units.valued())
        return value.to(read[0].dtype), lse

    # the ledger, and what is held

    def read_bytes(self, bulk: Segment) -> int:
        """Summaries, tail, and the units chosen by the last step; by the next one if none has been."""
        if bulk.length == 0:
            return 0
        whole = self.whole if self.reads else self.count(bulk) * self.units.grain == bulk.length
        looked = 0
        if self.scores_itself and (not whole or self.leads):
            looked = self.units.looked_bytes(bulk, self.group, whole=whole)
            looked = looked if self.index is None or whole else self.index.looked_bytes(bulk)
            if self.spec.tail == "drop" and self.asks:
                looked = looked * self.looks // self.asks
        if whole:
            return looked + bulk.read_bytes()
        return looked + self.units.tail_bytes() + self.units.exact_bytes() + self._chosen_bytes(bulk)

    def _chosen_bytes(self, bulk: Segment) -> int:
        """Bytes of the pages that the union of each KV head's choices touches."""
        if self.choice is None:
            return bulk.some_bytes(self.count(bulk) * self.units.grain)
        batch, kv_heads, grain, page = *self.choice.shape[:2], self.units.grain, self.spec.page
        read = self._read(bulk.length // grain)
        entries = (read[..., None] * grain + torch.arange(grain, device=read.device)).flatten(2)
        pages = -(-bulk.length // page)
        index = torch.where(entries < 0, pages, entries // page)  # what is nothing goes to one page too many
        touched = torch.zeros(batch, kv_heads, pages + 1, dtype=torch.bool, device=index.device)
        return bulk.page_bytes(touched.scatter(2, index, True)[..., :pages], page)

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.units.buffers()
        yield from self.fetched
        if self.index is not None:
            yield from self.index.buffers()
        for part in (self.cuts, self.credits, self.asking):
            if part is not None:
                yield from part.buffers()
        for held in (self.choice, self.age, self.asked, self.young):
            if held is not None:
                yield held

    def reorder(self, rows: torch.Tensor) -> None:
        self.units.reorder(rows)
        if self.index is not None:
            self.index.reorder(rows)
        for part in (self.cuts, self.credits, self.asking):
            if part is not None:
                part.reorder(rows)
        self.fetched = tuple(part[rows] for part in self.fetched)
        for name in ("choice", "age", "asked", "young"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows])


def _of(x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Of x [K,...] the part of some KV heads; all need no copy."""
    return x if len(heads) == len(x) else x[list(heads)]
