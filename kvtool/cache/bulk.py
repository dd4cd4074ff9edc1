"""Entries in order: raw sinks, a bulk that may be coded, and raw recent entries.

    [ sinks: the first S | bulk: whole blocks, in the order they came | recent: R … R + block − 1 newest ]

A block leaves `recent` for the bulk when R + block entries stand there, is encoded once, and is never touched again.
After t tokens the bulk therefore holds block · ⌊(t − S − R) / block⌋ of them, whatever the prompt's cut, unless a
selection thinned the prompt first (`keep/thinned.py`). A query never sees the effect of its own token: entries move
after the attention.

Without a store all entries are `recent`. The bulk may be a chain of encodings by age (`store/tiers.py`). An encoding
that fits itself to the prompt waits for its end. A branch has the shared entries of what it branched from before all
others. Shapes as in `lane.py`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from kvtool.cache.lane import Partial, Step, blank
from kvtool.cache.ordered import Ordered
from kvtool.cache.read.board import Board
from kvtool.cache.segments import Segment
from kvtool.cache.share.branching import branched
from kvtool.cache.share.shared import Shared
from kvtool.errors import InputError
from kvtool_kernels.ops import attend, merge


class Bulk(Ordered):
    """Which entries stand where, and who attends to them; options as in `Ordered`."""

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        pieces = self.pieces(k.shape[2]) if step.strict else [k.shape[2]]
        if len(pieces) == 1:
            return self._one(q, k, v, step)
        cut = zip(q.split(pieces, 2), k.split(pieces, 2), v.split(pieces, 2), step.split(pieces), strict=True)
        outs = [self._one(*parts) for parts in cut]
        return torch.cat([out for out, _ in outs], dim=2), torch.cat([lse for _, lse in outs], dim=2)

    def pieces(self, tokens: int) -> list[int]:
        """The tokens of a chunk, cut where a block moves; one by one if each chooses what it reads."""
        if self.block is None or not self.finished:
            return [tokens]
        if self.reader is not None:
            return [1] * tokens
        if self.closed:
            return [tokens]
        room = self.lacking() + self.limits[1] + self.block - self.recent.length
        first = min(tokens, room)
        rest = tokens - first
        return [first, *[self.block] * (rest // self.block), *[rest % self.block] * (rest % self.block > 0)]

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        self._receive(k, v, step, q)
        out = self._attend(q, step, causal=q.shape[2] > 1)
        self._observe(q, step)
        self._move()
        return out

    def plain(self, step: Step) -> bool:
        before = self.bulk.length or self.sinks.length or self.shared
        return not before and self.reader is None and step.chosen is None and self.recent.weight is None

    def enter(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        self._receive(k, v, step)
        return self.recent.recall()

    def leave(self, q: torch.Tensor, step: Step) -> None:
        self._observe(q, step)
        self._move()

    def _observe(self, q: torch.Tensor, step: Step) -> None:
        """The queries of the newest entries are there."""
        if not self.finished and q.shape[2]:
            self.look(q, step)

    def _receive(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        self.recent.append(k, v, self._most())
        if self.reader is not None:
            self.reader.receive(q, k, step, self.recent.keys())
        self.origin = step.origin
        if self.positions is None and step.places is not None and self._placed:
            self.positions = torch.zeros(*k.shape[:2], 0, dtype=torch.long, device=k.device)
        if self.positions is not None:
            new = torch.arange(self.fed, self.fed + k.shape[2]) if step.places is None else step.places
            new = new.to(k.device).expand(*self.positions.shape[:2], -1)
            self.positions = torch.cat([self.positions, new], dim=2)
        self.fed = self.fed + k.shape[2] if step.places is None else step.end(k.shape[2])

    @property
    def _placed(self) -> bool:
        """Must it be known where entries stand that do not follow one another?"""
        key = self.encodings[0]
        return (key is not None and not key.rotated) or (self.reader is not None and self.reader.places.wanted)

    def _most(self) -> int | None:
        """How many entries there will be at most, where that is known."""
        return None

    def _attend(self, q: torch.Tensor, step: Step, *, causal: bool) -> Partial:
        if step.chosen is not None:
            k, v, _ = self.recall()
            return step.chosen.attend(q, k, v, self.heads, step.options)
        return self._attend_before(q, step, self.recent.attend(q, step, causal=causal))

    def _attend_before(self, q: torch.Tensor, step: Step, out: Partial) -> Partial:
        """`out`, merged with attention over everything that is not recent."""
        reader = self.reader if q.shape[2] == 1 and self.bulk.length else None
        if reader is not None:
            out = merge(reader.attend(q, self.bulk, step), out)
        elif self.bulk.length:
            out = merge(self.bulk.attend(self.bulk.faced(q, step), step), out)
        before: list[Shared | Segment] = [self.sinks, *self.shared]  # of which a reader's are all sinks
        for segment in before:
            if segment.length:
                part = segment.attend(q, step) if reader is None else reader.before(q, segment, step)
                out = merge(part, out)
        return out

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        out = attend(q, k, v, causal=True, **step.options)
        if self.recent.length:
            out = merge(self.recent.attend(q, step), out)
        return self._attend_before(q, replace(step, start=step.start + k.shape[2] - q.shape[2]), out)

    def over(self, q: torch.Tensor, places: torch.Tensor, step: Step) -> Partial:
        out = self.recent.attend(q, step) if self.recent.length else blank(q)
        start = int(places[0]) if len(places) == 1 else step.start
        return self._attend_before(q, replace(step, start=start, places=places), out)

    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        if q is None or not (self.finished and self._asks and (step.start or step.strict)):
            self._receive(k, v, step, q)
        else:
            each = step.split([1] * k.shape[2])
            for row, key, value, now in zip(q.split(1, 2), k.split(1, 2), v.split(1, 2), each, strict=True):
                self._receive(key, value, now, row)
                self._observe(row, now)
        self._move()

    @property
    def _asks(self) -> bool:
        """Do decode steps depend on their own queries?"""
        return self.reader is not None and self.reader.watches

    def branch(self) -> Bulk:
        changes = self._changes()
        if changes is not None:
            raise InputError(
                f"entries that later tokens {changes[0]} cannot be shared", got=f"a plan that {changes[1]}",
                remedy="feed the prefix to every row, or share it under a plan without that",
            )  # fmt: skip
        assert self.finished
        if self._unfitted():
            raise InputError(
                "the prefix leaves nothing to fit an encoding to", got=f"{self.fed} tokens", remedy="share a longer one"
            )
        return branched(self)

    def aside(self) -> Bulk:
        if self.reader is None:
            return self
        made = copy.copy(self)
        made.reader = self.reader.aside()
        return made

    def meet(self, board: Board) -> None:
        if self.reader is not None:
            self.reader.place = replace(self.reader.place, board=board)

    def _changes(self) -> tuple[str, str] | None:
        """What later tokens do to entries that others might share, and the plan's part in it."""
        if self.older:
            return "encode again", "encodes entries again with age"
        if self.reader is not None and self.reader.index is not None and not self.reader.index.shareable:
            return "make an index of anew", "looks for what it reads in an index of all that is held"
        return None

    def _move(self) -> None:
        """Sinks first, then whole blocks into the bulk."""
        if self.block is None or not self.finished or self.closed:
            return
        spare = self.recent.length - self.limits[1]
        missing = min(self.lacking(), spare)
        if missing > 0:
            self.sinks.append(*self.recent.pop(missing))
            spare -= missing
            if self.reader is not None:
                self.reader.skip(missing)
        count = spare // self.block * self.block
        if count > 0:
            k, v = self.recent.pop(count)
            if self.reader is not None:
                self.reader.append(k, v)
            self.bulk.append(k, v)

    def settle(self, strict: bool) -> None:
        """The prompt is in: what still waits for its end goes on."""
        if not self.finished:
            self.finish()
        if self.reader is not None:
            self.reader.settle(self.bulk, strict)

    def finish(self) -> None:
        """The prompt is in."""
        self.finished = True
        self._move()
        self.closed = self.once
        self.queries = self.queries if self._unfitted() else []

    def _unfitted(self) -> bool:
        """Is there still an encoding that is to be fitted, to the first entries that it is given?"""
        return self.fits and self.bulk.length == 0 and not self.closed

    def look(self, q: torch.Tensor, step: Step) -> None:
        """Let encodings that fit themselves see q [B,H,T,D], the queries of the newest entries, all of them recent."""
        if any(self.watched) and not self.finished:
            self.queries.append(q.clone() if -1 in self.watched else q[:, :, -max(self.watched) :].clone())
