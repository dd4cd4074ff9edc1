"""A bulk that begins with entries of a shared prefix: what a branch reads of them, each of its rows chooses for itself.

    [ shared prefix: one row, whoever reads it | one more, of a branch of a branch | own: each row's ]

To whoever chooses, attends and counts it is one segment: elements are numbered through. A unit is within one of the
pieces, since blocks of whole units join a bulk. What is read whole is one product for all rows (`shared.py`); chosen
units are gathered from the prefix row by row, and are counted as read and moved that often.

Shapes as in `segments.py`; P entries in a page of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment
from kvtool.cache.share.shared import Shared
from kvtool_kernels.ops import merge


class Grafted(Segment):
    """`shared`, one behind the other, then `own`, which alone grows."""

    def __init__(self, shared: Sequence[Shared], own: Segment):
        self.shared, self.own = list(shared), own
        self.spare = 0  # bytes that pieces count as moved for units that are in another piece

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.before + self.own.length

    @property
    def before(self) -> int:
        """Entries that are shared."""
        return sum(shared.length for shared in self.shared)

    @property
    def slow(self) -> bool:  # type: ignore[override]
        return self.own.slow

    @property
    def moved(self) -> int:  # type: ignore[override]
        return sum(shared.moved for shared in self.shared) + self.own.moved - self.spare

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.own.append(k, v)

    def _all(self) -> list[Shared | Segment]:
        return [*self.shared, self.own]

    def _pieces(self) -> Iterator[tuple[int, Shared | Segment]]:
        """What holds something, and the first entry of each."""
        first = 0
        for piece in self._all():
            if piece.length:
                yield first, piece
            first += piece.length

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        return reduce(merge, (piece.attend(q, step) for _, piece in self._pieces()))

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        sides = zip(*(piece.recall(*span) for piece, span in self._spans(low, high)), strict=True)
        k, v = (torch.cat(side, 2) for side in sides)
        return k, v

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        return torch.cat([piece.keys(*span) for piece, span in self._spans(low, high)], 2)

    def _spans(self, low: int, high: int | None) -> Iterator[tuple[Shared | Segment, tuple[int, int]]]:
        """The pieces that hold entries low … high − 1, and which of their own those are."""
        high = self.length if high is None else high
        for first, piece in self._pieces():
            span = max(0, low - first), min(piece.length, high - first)
            if span[0] < span[1]:
                yield piece, span

    def apiece(self) -> Iterator[torch.Tensor]:
        for _, piece in self._pieces():
            yield piece.segment.keys() if isinstance(piece, Shared) else piece.keys()

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        for first, piece in self._pieces():
            places, count = units - first // unit, piece.length // unit
            mine = (places >= 0) & (places < count)
            here = int(mine.sum())
            if not here:
                continue
            moved = piece.moved
            pair = piece.gather(places.clamp(0, count - 1), unit)
            self.spare += (piece.moved - moved) * (mine.numel() - here) // mine.numel()
            entries = mine.repeat_interleave(unit, 2)[..., None]
            found = pair if found is None else _either(entries, pair, found)
        assert found is not None
        return found

    def buffers(self) -> Iterator[torch.Tensor]:
        for piece in self._all():
            yield from piece.buffers()

    def key_bytes(self) -> int:
        return sum(shared.segment.key_bytes() for shared in self.shared) + self.own.key_bytes()

    def read_bytes(self) -> int:
        return sum(piece.read_bytes() for _, piece in self._pieces())

    def some_bytes(self, count: int) -> int:
        every = sum(piece.rows * piece.read_bytes() for piece in self.shared)
        every += self.own.read_bytes() if self.own.length else 0
        return every * count // self.length

    def page_bytes(self, touched: torch.Tensor, page: int) -> int:
        each = touched.sum((0, 1))  # how many heads of all rows read a page
        places, total = torch.arange(len(each), device=each.device) * page, 0
        for first, piece in self._pieces():
            last = first + piece.length
            end = last if last < self.length else len(each) * page  # memory hands out the last page whole, too
            inside = places.clamp(first, end), (places + page).clamp(first, end)
            rows = 1 if isinstance(piece, Shared) else len(touched)
            count = int((each * (inside[1] - inside[0])).sum())
            total += piece.read_bytes() * count // (rows * touched.shape[1] * piece.length)
        return total

    def reorder(self, rows: torch.Tensor) -> None:
        for piece in self._all():
            piece.reorder(rows)


def _either(
    which: torch.Tensor, a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v of a where `which`, else of b."""
    return torch.where(which, a[0], b[0]), torch.where(which, a[1], b[1])
