"""What an index is: scores of the units that a query looks at, −inf for those that it passes by.

A file of this folder has a class `Found`, an `Index`; `SETTINGS`, what `Read.search` must say; PAGES: may units be of
several entries? and QUERIES: is it made from all of a prompt's queries? An index looks at `count` units at least, those
that are read. It knows nothing of what becomes of the scores, except how the query heads of a KV head agree on one,
`reduced`.

`Scan` is an index that looks at keys themselves. It is made when the first decode step reads, of what the bulk holds by
then; of what joins the bulk later every entry is looked at, until there are as many, and the index is made again. Where
the bulk is in slow memory, so is the index, and what is scanned is scanned there: only what is read moves.

Shapes: B batch, K KV heads of the lane, G query heads of each, S entries of the bulk, U units, C choosers per KV head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from kvtool import registry
from kvtool.cache.lane import Step
from kvtool.cache.read.units import Units
from kvtool.cache.segments import Segment
from kvtool.slots import Read
from kvtool_kernels.precision import wide, wider

Reduced = Callable[[torch.Tensor], torch.Tensor]  # scores [B,K,G,U] → [B,K,C,U]


class Watching:
    """What an index may watch; each does nothing until it is overridden."""

    def receive(self, q: torch.Tensor | None, k: torch.Tensor, step: Step) -> None:
        """Entries with keys k [B,K,T,D] have come, and q [B,H,T,D], where known, are their queries."""

    def append(self, k: torch.Tensor) -> None:
        """Entries with keys k [B,K,S,D], a multiple of the block, are about to join the bulk."""


class Index(Watching, ABC):
    """State is replaced, never written into."""

    held: ClassVar[tuple[str, ...]] = ()  # names of tensors [B,...], or None, that are held
    shareable: ClassVar[bool] = False  # is what it holds of early entries left alone by later ones?

    def __init__(self, spec: Read, units: Units):
        self.spec, self.units, self.search = spec, units, spec.search

    @abstractmethod
    def scores(self, q: torch.Tensor, bulk: Segment, count: int, reduced: Reduced) -> torch.Tensor:
        """q [B,K,G,D] → [B,K,G,U]."""

    @abstractmethod
    def looked_bytes(self, bulk: Segment) -> int:
        """Bytes that the last choice looked at."""

    def branch(self, units: Units) -> Index:
        """One that goes on from here and leaves this one alone; `units` are its own."""
        raise AssertionError("no index that is shared")

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from (held for name in self.held if (held := getattr(self, name)) is not None)

    def reorder(self, rows: torch.Tensor) -> None:
        for name in self.held:
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows])


class Scan(Index):
    """`made` entries are in the index, of which each of the `group` heads of a KV head looked at `scanned` at the last
    choice, on average, each for itself."""

    def __init__(self, spec: Read, units: Units):
        super().__init__(spec, units)
        self.made = 0
        self.scanned, self.group = 0.0, 1

    @abstractmethod
    def make(self, k: torch.Tensor) -> bool:
        """Of keys k [B,K,S,D]; or it cannot be made yet."""

    @abstractmethod
    def walk(self, q: torch.Tensor, k: torch.Tensor, count: int) -> torch.Tensor:
        """The products of q [B,K,G,D] with those of the keys k [B,K,S,D] that it looks at, else −inf, [B,K,G,S]."""

    @abstractmethod
    def walked_bytes(self) -> int:
        """Bytes of the index itself that the last choice read."""

    def scores(self, q: torch.Tensor, bulk: Segment, count: int, reduced: Reduced) -> torch.Tensor:
        k = bulk.home()
        own = q.to(k.device)
        if k.shape[2] >= 2 * self.made and self.make(k):
            self.made = k.shape[2]
        late = wide(own) @ wide(k[:, :, self.made :]).mT
        if not self.made:
            return late.to(q.device)
        found = self.walk(own, k[:, :, : self.made], max(1, count - late.shape[3]))
        self.group = q.shape[2]
        self.scanned = float((found > float("-inf")).sum()) / found[..., 0].numel()
        return torch.cat([found, late], 3).to(q.device)

    def looked_bytes(self, bulk: Segment) -> int:
        if not self.made:
            return bulk.key_bytes()
        looked = self.group * self.scanned + bulk.length - self.made
        return round(looked * bulk.key_bytes() / bulk.length) + self.walked_bytes()


def made(spec: Read, units: Units) -> Index | None:
    """The index that a reading asks for."""
    if spec.index is None:
        return None
    index: Index = registry.module("cache/read/indexes", spec.index, "index").Found(spec, units)
    return index


def products(q: torch.Tensor, k: torch.Tensor, at: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """q [B,K,G,D] times keys k [B,K,S,D], for the places b, k, g, s int64 of one shape that `at` gives."""
    row, head, query, entry = at
    dtype = wider(q.dtype)
    return torch.linalg.vecdot(q[row, head, query].to(dtype), k[row, head, entry].to(dtype))
