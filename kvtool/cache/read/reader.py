"""Reading only what a query needs: units of the bulk are scored and chosen, and attention sees the chosen ones alone.

    who is due? → scores of all units → a ranking per chooser, own or another layer's → the best → attend → tail

A `Reader` belongs to one lane. It holds the summaries (see `units.py`) and the last choice (see `choosing.py`); entries
stay in the lane's bulk. A budget of everything is `bulk.attend`, bit for bit.

Where a choice is made anew when a run of entries begins, or read by its queries, `Cuts` follow the entries from when
they come. Bytes read are those of the last step: the chosen units' union, in whole pages, and the summaries as often as
they have been looked at on average so far. Shapes: as in `units.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.read import tails
from kvtool.cache.read.board import Place
from kvtool.cache.read.choosing import Choosing
from kvtool.cache.read.credits import Credits
from kvtool.cache.segments import Dense, Segment
from kvtool.cache.share.shared import Shared
from kvtool.slots import Read
from kvtool_kernels.bias import hiding
from kvtool_kernels.ops import attend, merge


class Reader(Choosing):
    """Follows what joins the bulk, and attends over what is chosen of it."""

    def __init__(self, spec: Read, place: Place):
        super().__init__(spec, place)
        self.slow = spec.slow and self.budget != 1.0
        self.credits = Credits(spec.recent) if hasattr(self.units.rule, "CREDITS") else None
        self.joined = 0  # entries that have joined the bulk
        self.fetched: tuple[torch.Tensor, ...] = ()  # what was read of a slow bulk, as long as it is read again
        self.whole = False  # did the last step read everything?
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

    # attention over the choice

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
            bias = hiding(hidden)
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
