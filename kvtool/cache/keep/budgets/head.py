"""Each head keeps its own budget."""

from __future__ import annotations

from kvtool.cache.keep.budgets._base import Ballot, Limits

LEVEL = "head"
APART = False
FIXED = True


def deal(ballots: list[Ballot]) -> Limits:
    return [ballot.limits for ballot in ballots]
