"""A budget that falls from layer to layer in equal steps, and is the same for all heads of a layer.

    b = B − w;   low = ⌊b / β⌋;   high = 2b − low, but at most n − w, and then low = 2b − high
    layer l keeps  high − l · ⌊(high − low) / (L − 1)⌋  besides the w that always stay

(PyramidKV: Cai et al., arXiv 2406.02069.) B is the head's own budget, w the entries that always stay, n the entries, β is
`settings["beta"]`. Where n < 2b all layers keep b. Whole steps let the sum exceed L · B by less than L²/2 entries.
"""

from __future__ import annotations

from kvtool.cache.budgets._base import Ballot, Limits

LEVEL = "head"
APART = False
FIXED = True


def deal(ballots: list[Ballot]) -> Limits:
    return [[_limit(ballot, limit) for limit in ballot.limits] for ballot in ballots]


def _limit(ballot: Ballot, limit: int) -> int:
    layers, fixed = len(ballot.spec.budget), ballot.fixed
    beta = int(ballot.spec.settings["beta"])
    return fixed + falling(limit - fixed, ballot.entries, fixed, layers, beta)[ballot.view.layer]


def falling(budget: int, entries: int, fixed: int, layers: int, beta: int) -> list[int]:
    """What each layer keeps, `budget` on average, of so many entries of which `fixed` stay besides."""
    if budget <= 0 or entries < 2 * budget or layers == 1:
        return [max(0, budget)] * layers
    low = budget // beta
    high = 2 * budget - low
    if high >= entries - fixed:
        high = entries - fixed
        low = 2 * budget - high
    step = (high - low) // (layers - 1)
    return [high - layer * step for layer in range(layers)]
