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
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kvtool.cache.lane import Lane, Partial, Step, blank
from kvtool.cache.read.board import Board
from kvtool.cache.read.reader import Reader
from kvtool.cache.segments import Dense, Segment
from kvtool.cache.share.folding import joined
from kvtool.cache.share.grafted import Grafted
from kvtool.cache.share.shared import Shared
from kvtool.cache.store.coded import Coded
from kvtool.cache.store.pool import Member
from kvtool.cache.store.rest import Rest
from kvtool.cache.store.tiers import Tiers
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.rotary import Rotary
from kvtool_kernels.ops import attend, merge


class Bulk(Lane):
    """`block` None: nothing leaves `recent`. `key`, `value` None: the bulk is held raw, for `reader` to choose from.

    once: nothing leaves `recent` after the prompt's end.
    older, limits: the encodings that follow with age, and how many entries each one before them holds.
    """

    def __init__(
        self,
        heads: list[int],
        *,
        sink: int = 0,
        recent: int = 0,
        block: int | None = None,
        key: Encoding | None = None,
        value: Encoding | None = None,
        once: bool = False,
        older: Sequence[tuple[Encoding, Encoding]] = (),
        limits: Sequence[int] = (),
        rotary: Rotary | None = None,
        reader: Reader | None = None,
        member: Member | None = None,
    ):
        super().__init__(heads)
        self.limits, self.block = (sink, recent), block
        self.encodings, self.rotary, self.older, self.held = (key, value), rotary, older, limits
        self.reader, self.member = reader, member
        if reader is not None:
            reader.places.of = self._places
        self.sinks, self.recent = Dense(), Dense()
        self.queries: list[torch.Tensor] = []  # those that an encoding fits itself to, until the prompt's end
        self.watched: list[int] = []  # how many of the newest each looks at
        self.fits = self._watch(key, value)
        self.bulk: Segment = self._fresh()
        self.shared: list[Shared] = []
        self.positions: torch.Tensor | None = None  # int64 [B,K,N] of all entries not shared, where they are needed
        self.fed = self.origin = 0
        self.finished = not self.fits
        self.once, self.closed = once, False

    def _watch(self, *encodings: Encoding | None) -> bool:
        """Note which queries these encodings look at; do any fit themselves?"""
        held = [encoding for encoding in encodings if encoding is not None]
        self.watched += [encoding.observed for encoding in held]
        return any(encoding.fits for encoding in held)

    def _fresh(self) -> Segment:
        if self.member is not None:
            self.member.pool.coded.positions = self._bulk_positions
            return self.member
        key, value = self.encodings
        slow = self.reader is not None and self.reader.slow
        if key is None or value is None:
            return Dense(slow=slow)
        made = Coded(key, value, self.rotary, slow=slow)
        made.positions, made.queries = self._bulk_positions, self._seen
        if not self.older:
            return made
        assert self.block is not None
        tiers = [made, *(Coded(*pair, self.rotary) for pair in self.older)]
        return Tiers(tiers, list(self.held), self.block, self._bulk_positions)

    def _seen(self) -> torch.Tensor | None:
        """The observed queries of each KV head's group, [1,K,N,D]."""
        if not self.queries:
            return None
        q = torch.cat(self.queries, dim=2)
        q = q if -1 in self.watched else q[:, :, -max(self.watched) :]
        return q.unflatten(1, (len(self.heads), -1)).flatten(2, 3)

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
        room = self._lacking() + self.limits[1] + self.block - self.recent.length
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
        """Full sinks and the bulk are shared, and recent entries too where no block leaves them. What is chosen from
        stays one bulk, which goes on behind what is shared."""
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
        made = copy.copy(self)
        made.fits = False
        if isinstance(self.bulk, Coded):
            made.encodings = (self.bulk.key, self.bulk.value)
        made.bulk, made.shared = made._fresh(), [copy.copy(shared) for shared in self.shared]
        held = self.bulk if isinstance(self.bulk, Grafted) else None
        bulk = self.bulk if held is None else held.own
        grafts = [] if held is None else [shared.again() for shared in held.shared]
        parts = [self.recent] if self.block is None else [self.sinks, bulk] if self._lacking() == 0 else []
        first = 0
        for part in parts:
            if part.length:
                places = None if self.positions is None else self.positions[:, :, first : first + part.length]
                places = None if places is None else places + self.origin
                shared = Shared(part, len(self.heads), self._ahead() + first + self.origin, places)
                (grafts if part is bulk and self.reader is not None else made.shared).append(shared)
            first += part.length
        if self.positions is not None:
            made.positions = self.positions[:, :, first:].clone()
        for name in ("sinks", "recent"):
            mine, own = getattr(self, name), Dense()
            if mine not in parts and mine.length:
                own.append(*mine.recall())
            setattr(made, name, own)
        if self.reader is not None:
            made.reader = self.reader.branch()
            made.reader.places.of = made._places
            made.bulk = Grafted(grafts, made.bulk) if grafts else made.bulk
        return made

    def aside(self) -> Bulk:
        if self.reader is None:
            return self
        made = copy.copy(self)
        made.reader = self.reader.aside()
        return made

    def meet(self, board: Board) -> None:
        """From now on, tell other layers of the same cache, and be told by them, here."""
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
        missing = min(self._lacking(), spare)
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

    def _lacking(self) -> int:
        """Sinks that are still to come."""
        return max(0, self.limits[0] - self._ahead() - self.sinks.length)

    def _ahead(self) -> int:
        """Shared entries."""
        grafted = self.bulk.before if isinstance(self.bulk, Grafted) else 0
        return sum(segment.length for segment in self.shared) + grafted

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

    def _bulk_positions(self, low: int, high: int) -> torch.Tensor:
        """Positions of entries of the bulk, int64 [S] or [B,K,S]."""
        low, high = low + self.sinks.length, high + self.sinks.length
        held = torch.arange(low, high) + self._ahead() if self.positions is None else self.positions[:, :, low:high]
        return held + self.origin

    def _places(self, low: int, high: int) -> torch.Tensor:
        """The same for a reader, to whom what is shared is the bulk's beginning, and sinks are below 0."""
        sinks = self.sinks.length + sum(segment.length for segment in self.shared)
        if self.positions is None:
            return torch.arange(low + sinks, high + sinks) + self.origin
        pieces = [*self.shared, *(self.bulk.shared if isinstance(self.bulk, Grafted) else ())]
        held = [piece.places().expand(1, len(self.heads), -1) for piece in pieces]
        return joined([*(x.to(self.positions.device) for x in held), self.positions + self.origin])[
            :, :, low + sinks : high + sinks
        ]

    def recall(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        parts = [segment.recall() for segment in self._everything() if segment.length]
        width = max(k.shape[-1] for k, _ in parts)  # of keys that meet more than the query: others meet no more of it
        keys = [k if k.shape[-1] == width else torch.nn.functional.pad(k, (0, width - k.shape[-1])) for k, _ in parts]
        return torch.cat(keys, dim=2), torch.cat([v for _, v in parts], dim=2), 0

    def _segments(self) -> tuple[Segment, ...]:
        return self.sinks, self.bulk, self.recent

    def _everything(self) -> list[Shared | Rest | Segment]:
        return [*self.shared, *self._segments()]

    def buffers(self) -> Iterator[torch.Tensor]:
        for segment in self._everything():
            yield from segment.buffers()
        yield from self.queries
        if self.positions is not None:
            yield self.positions
        if self.reader is not None:
            yield from self.reader.buffers()

    def entries(self) -> int:
        return sum(shared.length for shared in self.shared) + sum(segment.length for segment in self._segments())

    @property
    def listed(self) -> bool:
        """Are all entries that came still there, in order?"""
        return Bulk.entries(self) == self.fed

    def read_bytes(self) -> int:
        raw = sum(segment.read_bytes() for segment in self._everything() if segment is not self.bulk)
        return raw + (self.bulk.read_bytes() if self.reader is None else self.reader.read_bytes(self.bulk))

    def slow_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.bulk.buffers()) if self.bulk.slow else 0

    def moved_bytes(self) -> int:
        return self.bulk.moved

    def reorder(self, rows: torch.Tensor) -> None:
        for segment in self._everything():
            segment.reorder(rows)
        if self.positions is not None:
            self.positions = self.positions[rows]
        if self.reader is not None:
            self.reader.reorder(rows)
