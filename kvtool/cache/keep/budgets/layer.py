"""The budget of a layer goes to the best scores of all its heads (AdaKV: Feng et al., arXiv 2407.11550)."""

from __future__ import annotations

from kvtool.cache.keep.budgets._base import Ballot, Limits, pooled

LEVEL = "layer"
APART = True
FIXED = False


def deal(ballots: list[Ballot]) -> Limits:
    return pooled(ballots)
