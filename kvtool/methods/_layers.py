"""Budgets of layers: what small ones cost each layer, measured on prompts, and dealing entries to layers by scores.

A budget that is a share is turned into entries of a prompt, and back. Layers with a sliding window of their own hold
what it holds under any budget, so nothing is dealt to them or taken from them. L layers, P selections, N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtool.measuring import sensitivity
from kvtool.methods._base import Context
from kvtool.methods._prompts import prompts
from kvtool.plan import Plan
from kvtool.slots import Keep


def errors(context: Context, keeps: Sequence[Keep], *, samples: int, tokens: int, steps: int) -> torch.Tensor:
    """fp64 [N,P,L]: how much each layer's output changes under each selection (`measuring/sensitivity.py`), on
    `samples` prompts, text and passkeys, of `tokens` tokens, over `steps` that are decoded after them."""
    read = prompts(context, samples=samples, tokens=tokens, steps=steps)
    plans = [Plan("probe", context.running.fingerprint, keep=keep) for keep in keeps]
    return sensitivity.errors(context.running, plans, read, context.progress)


def whole(context: Context) -> list[int]:
    """Layers without a window of their own."""
    return [layer for layer, window in enumerate(context.geometry.windows) if window is None]


def by_score(context: Context, score: torch.Tensor, budget: float, *, floor: float, tokens: int) -> torch.Tensor:
    """fp32 [L,K], in the mean `budget` (a share if at most 1): `allotted` by the scores [L] of layers, divided by their
    sum. floor is a count of entries; shares are those of a prompt of `tokens` tokens."""
    layers, scale = whole(context), tokens if budget <= 1 else 1
    entries, cap = round(budget * scale), tokens if budget <= 1 else 1 << 31
    own = score[layers].double()
    own = own / own.sum() if float(own.sum()) > 0 else torch.full_like(own, 1 / max(1, len(layers)))
    least = 1 if budget <= 1 else 2  # a budget of 1 would be all entries
    counts = allotted(own.tolist(), entries, floor=max(least, int(floor)), cap=cap)
    return spread(context, counts, entries, scale)


def spread(context: Context, counts: list[int], entries: int, scale: int) -> torch.Tensor:
    """fp32 [L,K] of so many entries for each layer without a window, and `entries` for the others, in units of
    1/scale."""
    made = torch.full((context.geometry.layers,), float(entries))
    made[whole(context)] = torch.tensor(counts).float()
    return (made / scale)[:, None].repeat(1, context.geometry.kv_heads)


def allotted(score: list[float], budget: int, *, floor: int, cap: int) -> list[int]:
    """Entries of each layer, by scores that are 1 in sum: `budget` in the mean, at least `floor` and at most three
    times the budget, or the cap. What rounding and clipping leave goes to the layers with the highest scores, or is
    taken from those with the lowest."""
    layers, floor, cap = len(score), min(floor, budget), max(budget, min(3 * budget, cap))
    spare = (budget - floor) * layers
    counts = [min(cap, floor + round(each * spare)) for each in score]
    return evened(counts, budget * layers, sorted(range(layers), key=lambda layer: -score[layer]), floor, cap)


def evened(counts: list[int], total: int, order: list[int], floor: int, cap: int) -> list[int]:
    """counts, but `total` in sum, as far as floor and cap allow: one by one, more for the first in order, less for the
    last."""
    counts = list(counts)
    while (missing := total - sum(counts)) > 0 and (below := [at for at in order if counts[at] < cap]):
        for at in below[:missing]:
            counts[at] += 1
    while (over := sum(counts) - total) > 0 and (above := [at for at in reversed(order) if counts[at] > floor]):
        for at in above[:over]:
            counts[at] -= 1
    return counts
