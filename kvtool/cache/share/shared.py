"""Entries of one sequence that every row of a batch reads: a shared prefix, held and encoded once.

Every query stands after all of them, so that the rows of the batch become rows of one product:

    attend(q [B,H,T,D], prefix) = attend(q folded to [1,K,G·B·T,D], prefix [1,K,S,D]), unfolded

(Hydragen: Juravsky et al., arXiv 2402.05099). Later tokens neither change nor see what is here.

Shapes: B batch, K KV heads of the lane, H = K·G their query heads, T tokens, S entries, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment
from kvtool.cache.store.coded import Coded


class Shared:
    """What `segment`, of one row, holds now; it may grow afterwards. Its entries stand at `positions` int64 [1,K,S], or
    from `first` on."""

    def __init__(self, segment: Segment, kv_heads: int, first: int, positions: torch.Tensor | None):
        self.segment, self.kv_heads, self.rows = copy.copy(segment), kv_heads, 1
        self.first, self.positions = first, positions
        self.segment.moved = 0  # what other holders had fetched is theirs to count
        if isinstance(self.segment, Coded):
            self.segment.parts = {side: dict(parts) for side, parts in self.segment.parts.items()}
            self.segment.positions = self._places

    def _places(self, low: int, high: int) -> torch.Tensor:
        if self.positions is None:
            return torch.arange(self.first + low, self.first + high)
        return self.positions[..., low:high]

    def places(self) -> torch.Tensor:
        """Positions of all entries, int64 [S] or [1,K,S]."""
        return self._places(0, self.length)

    @property
    def length(self) -> int:
        """Entries, the same for every row."""
        return self.segment.length

    @property
    def moved(self) -> int:
        """Bytes brought from slower memory."""
        return self.segment.moved

    def again(self) -> Shared:
        """The same for one more holder."""
        return Shared(self.segment, self.kv_heads, self.first, self.positions)

    @property
    def placed(self) -> bool:
        """Does attention depend on where the queries stand?"""
        return isinstance(self.segment, Coded) and self.segment.value.joint

    @property
    def key(self) -> tuple[int, ...]:
        """What those who hold the same entries have in common."""
        return (self.length, self.first, *(id(buffer) for buffer in self.segment.buffers()))

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        """q [B,H,T,D], which all stand after these entries."""
        if self in step.given:
            return step.given[self]
        q = self.segment.faced(q, step)
        batch, heads, tokens, width = q.shape
        rows = q.reshape(batch, self.kv_heads, -1, width).transpose(0, 1)
        out, lse = self.segment.attend(rows.reshape(1, self.kv_heads, -1, width), step)
        out = out.reshape(self.kv_heads, batch, -1, out.shape[-1]).transpose(0, 1)
        lse = lse.reshape(self.kv_heads, batch, -1).transpose(0, 1)
        return out.reshape(batch, heads, tokens, -1), lse.reshape(batch, heads, tokens)

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries low … high − 1 as attention sees them, k, v [B,K,S,D]: views of one row."""
        k, v = self.segment.recall(low, high)
        return k.expand(self.rows, -1, -1, -1), v.expand(self.rows, -1, -1, -1)

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        """Only the keys of `recall`."""
        return self.segment.keys(low, high).expand(self.rows, -1, -1, -1)

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Segment.gather`, units int64 [B,K,M] of each row's own."""
        rows = len(units)
        k, v = self.segment.gather(units.transpose(0, 1).flatten(1, 2)[None], unit)
        k, v = (x[0].unflatten(1, (rows, -1)).transpose(0, 1) for x in (k, v))
        return k, v

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor held, once for all rows."""
        yield from self.segment.buffers()
        if self.positions is not None:
            yield self.positions

    def read_bytes(self) -> int:
        """Bytes that one decode step of all rows reads."""
        return self.segment.read_bytes()

    def reorder(self, rows: torch.Tensor) -> None:
        """All rows are alike."""
        self.rows = len(rows)
