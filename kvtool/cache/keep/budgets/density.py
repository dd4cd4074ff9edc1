"""Layers whose attention is spread over many entries keep more, those that look at a few keep less.

    F_l = mean over query heads of (v_h − min v) / (max v − min v),   v_h the variance along entries of what head h's
                                                                      queries pay them; 0 where all heads vary alike
    layer l keeps  clamp(softmax_l(−F) · L · b_l, n / 100, n)  of n entries;   b_l is its own budget

(D2O: Wan et al., arXiv 2406.13035, as released.) A layer whose own budget is more than the prompt keeps that, and takes
part in the softmax. What queries pay is added up as `Select.reduce` says, in D2O over the whole prompt. Minimum and
maximum are over the heads of one layer, so that F tells how alike its heads are, not how large their variance is.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.budgets._base import Ballot, Limits, by_layer

LEVEL = "model"
APART = False
FIXED = False
LEAST = 0.01  # share of the prompt


def deal(ballots: list[Ballot]) -> Limits:
    layers, found = by_layer(ballots), []
    for group in layers.values():
        paid = torch.cat([ballot.view.paid[0] for ballot in group])
        found.append(density(paid.double().var(-1, correction=min(1, paid.shape[-1] - 1))))
    weights = torch.softmax(-torch.stack(found), 0) * len(layers)
    dealt = dict(zip(layers, weights.tolist(), strict=True))
    return [[_limit(dealt[b.view.layer], limit, b.entries) for limit in b.limits] for b in ballots]


def density(variances: torch.Tensor) -> torch.Tensor:
    """F of a layer whose heads have these variances, [H] → a scalar."""
    low, high = variances.min(), variances.max()
    return ((variances - low) / (high - low)).mean() if high > low else torch.zeros_like(low)


def _limit(weight: float, own: int, entries: int) -> int:
    if own > entries:
        return own
    return max(1, round(LEAST * entries), min(entries, round(weight * own)))
