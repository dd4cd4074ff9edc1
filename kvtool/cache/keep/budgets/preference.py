"""The budget of the model goes to layers whose newest queries look far around and at ever new places; the heads of a
layer share alike.

    H_l = −Σ a·ln(a + ε),   V_l = Σ Var_i a     over the layer's query heads, the observed queries i, the free entries
    layer l keeps, besides what always stays, the share H_l^{1/τ1} · V_l^{1/τ2} of what all layers may keep

(CAKE: Qin et al., arXiv 2503.12491; rounding as in the released code.) a is attention after the
softmax over all entries, τ1 and τ2 are `settings["tau1"]` and `settings["tau2"]`. Where no layer is preferred, because
all queries attend alike, all keep the same.
"""

from __future__ import annotations

import math

import torch

from kvtool.cache.keep.budgets._base import Ballot, Limits, by_layer
from kvtool.cache.keep.scores._base import probabilities

LEVEL = "model"
APART = False
FIXED = False
TINY = 1e-10  # ε: nothing is attended to so little that its logarithm matters


def deal(ballots: list[Ballot]) -> Limits:
    layers = by_layer(ballots)
    own = [_own(group) for group in layers.values()]
    cap = ballots[0].entries - ballots[0].fixed
    if sum(own) >= cap * len(layers):
        return [ballot.limits for ballot in ballots]
    wanted = shares([preference(group) for group in layers.values()])
    counts = adjusted([share * sum(own) for share in wanted], sum(own), cap)
    dealt = dict(zip(layers, counts, strict=True))
    return [[max(1, ballot.fixed + dealt[ballot.view.layer])] * len(ballot.limits) for ballot in ballots]


def _own(group: list[Ballot]) -> int:
    """What a head of this layer may keep by itself, in the mean, besides what always stays."""
    limits = [max(0, limit - ballot.fixed) for ballot in group for limit in ballot.limits]
    return sum(limits) // len(limits)


def preference(group: list[Ballot]) -> float:
    """H^{1/τ1} · V^{1/τ2} of the lanes of one layer."""
    entropy, variance, settings = 0.0, 0.0, group[0].spec.settings
    for ballot in group:
        mine = spread(ballot)
        entropy, variance = entropy + mine[0], variance + mine[1]
    return max(0.0, entropy) ** (1 / settings["tau1"]) * variance ** (1 / settings["tau2"])


def spread(ballot: Ballot) -> tuple[float, float]:
    """(H, V) of one lane: entropy in nats, and unbiased variance over the observed queries."""
    entropy, count = 0.0, len(ballot.view.rows)
    total = squares = torch.zeros((), dtype=torch.float32)
    for _, p in probabilities(ballot.view):
        a = p[..., ballot.free].double()
        entropy -= float((a * (a + TINY).log()).sum())
        total, squares = total + a.sum(2), squares + a.square().sum(2)
    return entropy, float((squares - total.square() / count).clamp_min(0).sum()) / max(1, count - 1)


def shares(weights: list[float]) -> list[float]:
    """Parts of the sum; equal ones where there is no sum to speak of."""
    whole = sum(weights)
    if not (math.isfinite(whole) and whole > 0):
        return [1 / len(weights)] * len(weights)
    return [weight / whole for weight in weights]


def adjusted(wanted: list[float], total: int, cap: int) -> list[int]:
    """Whole numbers near `wanted`, at most `cap` each, that sum to `total` as far as the cap allows. What is cut off
    goes evenly to the others, and so does then what rounding has left."""
    whole = [int(want) for want in wanted]
    counts = [min(count, cap) for count in whole]
    _give(counts, sum(whole) - sum(counts), cap)
    _give(counts, total - sum(counts), cap)
    return counts


def _give(counts: list[int], extra: int, cap: int) -> None:
    """Add `extra` evenly to those below the cap; a remainder goes to the first of them, one each."""
    while extra > 0 and (below := [at for at, count in enumerate(counts) if count < cap]):
        each, more = divmod(extra, len(below))
        for place, at in enumerate(below):
            gift = min(each + (place < more), cap - counts[at])
            counts[at] += gift
            extra -= gift
