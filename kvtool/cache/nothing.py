"""A layer that attends to nothing and holds nothing: what it puts out is the neutral element of the merge, (0, −inf).

Shapes as in `lane.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool.cache.lane import Lane, Partial, Step, blank
from kvtool.cache.read.board import Board


class Nothing(Lane):
    """All KV heads of a dropped layer (`Keep.dropped`)."""

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        return blank(q)

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        return blank(q)

    def renew(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        return blank(q)

    def over(self, q: torch.Tensor, places: torch.Tensor, step: Step) -> Partial:
        return blank(q)

    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        """Nothing is kept."""

    def branch(self) -> Nothing:
        return self

    def meet(self, board: Board) -> None:
        """It shares nothing."""

    def recall(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        raise AssertionError("nobody goes on from a layer that holds nothing")

    def buffers(self) -> Iterator[torch.Tensor]:
        return iter(())

    def entries(self) -> int:
        return 0

    def read_bytes(self) -> int:
        return 0

    def reorder(self, rows: torch.Tensor) -> None:
        """There are no rows."""
