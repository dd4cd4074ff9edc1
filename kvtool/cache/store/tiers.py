"""Precision by age: the bulk as a chain of encodings, each coarser than the one before.

    [ oldest, coarsest | … | youngest coded ]   a block moves on when its tier holds more than its limit

A tier that can write what it is given by dropping low bits of its codes does that, so that no error is added to the
coarser code's own (`Affine.coarser`); else entries are decoded and written again, and the errors of both add up.
Shapes as in `segments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment
from kvtool.cache.store.coded import Coded
from kvtool_kernels.ops import merge

Positions = Callable[[int, int], torch.Tensor]


class Tiers(Segment):
    """tiers: coded segments, youngest first. limits: entries that each but the last holds. block: entries that move on
    together. positions(low, high): of the bulk's entries, int64 [S] or [B,K,S]."""

    def __init__(self, tiers: list[Coded], limits: list[int], block: int, positions: Positions):
        self.tiers, self.limits, self.block = tiers, limits, block
        for number, tier in enumerate(tiers):
            tier.positions = self._own(number, positions)

    @property
    def length(self) -> int:  # type: ignore[override]
        return sum(tier.length for tier in self.tiers)

    def _own(self, number: int, positions: Positions) -> Positions:
        """Positions of one tier's entries, which stand behind those of all older ones."""

        def of(low: int, high: int) -> torch.Tensor:
            before = sum(tier.length for tier in self.tiers[number + 1 :])
            return positions(low + before, high + before)

        return of

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """In blocks, so that what is held does not depend on how many entries come at a time."""
        for key, value in zip(k.split(self.block, 2), v.split(self.block, 2), strict=True):
            self.tiers[0].append(key, value)
            for tier, after, limit in zip(self.tiers, self.tiers[1:], self.limits, strict=False):
                spare = (tier.length - limit) // self.block * self.block
                if spare > 0:
                    tier.hand_on(spare, after)

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        outs = [tier.attend(q, step) for tier in self.tiers if tier.length]
        total = outs[0]
        for out in outs[1:]:
            total = merge(out, total)
        return total

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        sides = zip(*(tier.recall() for tier in reversed(self.tiers) if tier.length), strict=True)
        k, v = (torch.cat(side, dim=2)[:, :, low:high] for side in sides)
        return k, v

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        return torch.cat([tier.keys() for tier in reversed(self.tiers) if tier.length], dim=2)[:, :, low:high]

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = (units[..., None] * unit + torch.arange(unit, device=units.device)).flatten(2)[..., None]
        k, v = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in self.recall())
        return k, v

    def buffers(self) -> Iterator[torch.Tensor]:
        for tier in self.tiers:
            yield from tier.buffers()

    def key_bytes(self) -> int:
        return sum(tier.key_bytes() for tier in self.tiers)

    def reorder(self, rows: torch.Tensor) -> None:
        for tier in self.tiers:
            tier.reorder(rows)
