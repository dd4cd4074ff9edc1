"""What a selection drops from the entries held in full: held on in a lower encoding, instead of freed.

Dropped entries wait raw until a block of them is there, and are then written once. In which order they come says the
selection, so positions are kept where keys are stored before RoPE. Shapes as in `segments.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Dense
from kvtool.cache.store.coded import Coded
from kvtool.encoding.encoding import Encoding
from kvtool_kernels.ops import merge


class Rest:
    """`coded`: empty; `block`: entries that are written together."""

    def __init__(self, coded: Coded, block: int):
        self.coded, self.block, self.waiting = coded, block, Dense()
        self.positions: torch.Tensor | None = None  # int64 [B,K,N]
        coded.positions = self._positions

    @property
    def encodings(self) -> tuple[Encoding, Encoding]:
        """Of keys and of values."""
        return self.coded.key, self.coded.value

    @property
    def length(self) -> int:
        return self.coded.length + self.waiting.length

    def add(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """Entries k, v [B,K,S,D] with their positions int64 [B,K,S]."""
        if not self.coded.key.rotated:
            held = self.positions
            self.positions = positions if held is None else torch.cat([held, positions], dim=2)
        if self.block == 1:
            self.coded.append(k, v)
            return
        self.waiting.append(k, v)
        count = self.waiting.length // self.block * self.block
        if count:
            self.coded.append(*self.waiting.pop(count))

    def _positions(self, low: int, high: int) -> torch.Tensor:
        assert self.positions is not None
        return self.positions[:, :, low:high]

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        """Every entry is visible to every query."""
        outs = [part.attend(q, step) for part in (self.coded, self.waiting) if part.length]
        return outs[0] if len(outs) == 1 else merge(*outs)

    def recall(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All entries as attention sees them."""
        sides = zip(*(part.recall() for part in (self.coded, self.waiting) if part.length), strict=True)
        k, v = (torch.cat(side, dim=2) for side in sides)
        return k, v

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.coded.buffers()
        yield from self.waiting.buffers()
        if self.positions is not None:
            yield self.positions

    def read_bytes(self) -> int:
        return self.coded.read_bytes() + self.waiting.read_bytes()

    def reorder(self, rows: torch.Tensor) -> None:
        self.coded.reorder(rows)
        self.waiting.reorder(rows)
        self.positions = None if self.positions is None else self.positions[rows]
