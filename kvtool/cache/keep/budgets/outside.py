"""Everything outside of spans stays, and inside of them what a budget leaves room for (LOOK-M: arXiv 2406.18139).

    limit = w + max(entries outside, b − w)      w: those that always stay, b: the head's own budget, a lower bound

Without a span nothing leaves. Settings and needs are those of the score `outside`, which must be the selection's.
"""

from __future__ import annotations

from kvtool.cache.keep.budgets._base import Ballot, Limits
from kvtool.cache.keep.scores.outside import spans

LEVEL = "head"
APART = False
FIXED = False


def deal(ballots: list[Ballot]) -> Limits:
    return [_limits(ballot) for ballot in ballots]


def _limits(ballot: Ballot) -> list[int]:
    inside = spans(ballot.view)[0, 0]
    if not bool(inside.any()):
        return [ballot.entries] * len(ballot.limits)
    outside = int((~inside[ballot.free]).sum())
    return [ballot.fixed + max(outside, limit - ballot.fixed) for limit in ballot.limits]
