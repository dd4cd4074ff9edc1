"""A budget that falls from layer to layer in equal steps, and is the same for all heads of a layer.

    b = B − w;   low = ⌊b / β⌋;   high = 2b − low, but at most n − w, and then low = 2b − high
    layer l keeps  high − l · ⌊(high − low) / (L − 1)⌋  besides the w that always stay

(PyramidKV: Cai et al., arXiv 2406.02069.) B is the head's own budget, w the entries that always stay, n the entries, β
is `settings["beta"]`. Whole steps let the sum exceed L · B by less than L²/2 entries. With `settings["flat"]` all
layers keep b where n < 2b, as the released code does.
"""

from __future__ import annotations

from kvtool.cache.keep.budgets._base import Ballot, Limits

LEVEL = "head"
APART = False
FIXED = True


def deal(ballots: list[Ballot]) -> Limits:
    return [[_limit(ballot, limit) for limit in ballot.limits] for ballot in ballots]


def _limit(ballot: Ballot, limit: int) -> int:
    layers, fixed, settings = len(ballot.spec.budget), ballot.fixed, ballot.spec.settings
    budget = limit - fixed
    if settings["flat"] and ballot.entries < 2 * budget:
        return limit
    return fixed + falling(budget, ballot.entries - fixed, layers, int(settings["beta"]))[ballot.view.layer]


def falling(budget: int, entries: int, layers: int, beta: int) -> list[int]:
    """What each layer keeps of so many entries, `budget` on average."""
    if not 0 < budget < entries or layers == 1:
        return [max(0, budget)] * layers
    low = budget // beta
    high = 2 * budget - low
    if high >= entries:
        high = entries
        low = 2 * budget - high
    step = (high - low) // (layers - 1)
    return [high - layer * step for layer in range(layers)]
