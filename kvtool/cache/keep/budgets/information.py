"""One threshold for all layers: each keeps the fewest entries that hold the share p of its score, and p is what the
budget of the model allows.

    C_l(k) = score of the k best of layer l / score of all;   k_l(p) = min {k: C_l(k) ≥ p}
    layer l holds min(n, k_l(p) + what always stays);   p by bisection, so that all layers hold what they may in sum

(PrefixKV: Wang et al., arXiv 2412.03409.) What always stays counts in C_l too, and is added all the same, as in the
released code. That stops within 5 entries of the budget and scales the layers to meet it; here the search goes on until
it is met, and where layers step over the last threshold together, they share what is left. The heads of a layer hold
alike, by the mean of their scores.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.budgets._base import Ballot, Limits, by_layer

LEVEL = "model"
APART = False
FIXED = False
HALVINGS = 60  # beyond the last bit of p


def deal(ballots: list[Ballot]) -> Limits:
    layers = by_layer(ballots)
    own = {layer: _mean([limit for b in group for limit in b.limits]) for layer, group in layers.items()}
    entries, fixed = ballots[0].entries, ballots[0].fixed
    if sum(own.values()) >= entries * len(layers):
        return [ballot.limits for ballot in ballots]
    curves = [curve(torch.cat([b.scores[0] for b in group]).double().mean(0)) for group in layers.values()]
    dealt = dict(zip(layers, shared(curves, sum(own.values()), fixed) or own.values(), strict=True))
    return [[dealt[ballot.view.layer]] * len(ballot.limits) for ballot in ballots]


def _mean(limits: list[int]) -> int:
    return sum(limits) // len(limits)


def curve(scores: torch.Tensor) -> torch.Tensor:
    """Scores [S] → C, fp64 [S]: the share of the sum that the best hold; equal steps where there is no sum."""
    best = scores.double().clamp_min(0).sort(descending=True).values
    total = best.sum()
    if not bool(torch.isfinite(total)) or float(total) == 0:
        best, total = torch.ones_like(best), torch.tensor(float(len(best)), dtype=torch.float64)
    return (best / total).cumsum(0)


def held(curves: list[torch.Tensor], p: float, fixed: int) -> list[int]:
    """Entries that each layer holds at the threshold p."""
    return [min(len(line), int((line < p).sum()) + 1 + fixed) for line in curves]


def shared(curves: list[torch.Tensor], total: int, fixed: int) -> list[int]:
    """Entries of each layer that sum to `total`; nothing where even the lowest threshold holds more."""
    low, high = 0.0, 1.0
    if sum(held(curves, low, fixed)) > total:
        return []
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(held(curves, middle, fixed)) > total:
            high = middle
        else:
            low = middle
    counts, most = held(curves, low, fixed), held(curves, high, fixed)
    while sum(counts) < total and (short := [at for at, count in enumerate(counts) if count < most[at]]):
        for at in short[: total - sum(counts)]:
            counts[at] += 1
    return counts
