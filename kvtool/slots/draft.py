"""The slot draft: the cache only proposes."""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.records import Record


@dataclass(frozen=True)
class Draft(Record):
    """The cache only proposes: `tokens` at a time, verified by the full cache."""

    tokens: int = 4

    @property
    def lossless(self) -> bool:
        """The slot is filled; that the output is the full cache's is the draft's point, not its absence."""
        return False
