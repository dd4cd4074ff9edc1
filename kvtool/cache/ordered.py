"""What a lane of entries in order holds, where that stands, and what it costs to hold and to read.

    [ shared: before all others | sinks: the first S | bulk: whole blocks, in the order they came | recent ]

The bulk is raw, coded, a chain of encodings by age (`store/tiers.py`), or one with other layers (`store/pool.py`). What
is shared is what a branch has of what it branched from. How entries move from one segment to the next, `bulk.py` says.
Shapes as in `lane.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvtool.cache.lane import Lane
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
from kvtool.rotary import Rotary


class Ordered(Lane):
    """Abstract: the segments, `reader`, which chooses what is read of the bulk, and where entries stand.

    `block` None: nothing leaves `recent`. `key`, `value` None: the bulk is held raw, for `reader` to choose from.

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
            reader.places.of = self.places
        self.sinks, self.recent = Dense(), Dense()
        self.queries: list[torch.Tensor] = []  # those that an encoding fits itself to, until the prompt's end
        self.watched: list[int] = []  # how many of the newest each looks at
        self.fits = self._watch(key, value)
        self.bulk: Segment = self.fresh()
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

    def fresh(self) -> Segment:
        """An empty bulk."""
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

    def lacking(self) -> int:
        """Sinks that are still to come."""
        return max(0, self.limits[0] - self.ahead() - self.sinks.length)

    def ahead(self) -> int:
        """Shared entries."""
        grafted = self.bulk.before if isinstance(self.bulk, Grafted) else 0
        return sum(segment.length for segment in self.shared) + grafted

    def _bulk_positions(self, low: int, high: int) -> torch.Tensor:
        """Positions of entries of the bulk, int64 [S] or [B,K,S]."""
        low, high = low + self.sinks.length, high + self.sinks.length
        held = torch.arange(low, high) + self.ahead() if self.positions is None else self.positions[:, :, low:high]
        return held + self.origin

    def places(self, low: int, high: int) -> torch.Tensor:
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
        return Ordered.entries(self) == self.fed

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
