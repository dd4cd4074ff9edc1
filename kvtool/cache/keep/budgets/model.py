"""The budget of the model goes to the best scores of all heads of all layers."""

from __future__ import annotations

from kvtool.cache.keep.budgets._base import Ballot, Limits, pooled

LEVEL = "model"
APART = True
FIXED = False


def deal(ballots: list[Ballot]) -> Limits:
    return pooled(ballots)
