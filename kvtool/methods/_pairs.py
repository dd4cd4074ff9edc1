"""Which adjacent layers are written as one: pairs without overlap, for keys, for values or for both, that cost least.

    min Σ cost over chosen (pair, side),   no layer in two pairs,   `count` of them

Solved exactly, layer by layer: the best choice among the first l layers either leaves out layer l − 1 or pairs it with
the one before.
"""

from __future__ import annotations

import torch

Choice = dict[int, tuple[int, ...]]  # first layer of a pair → its sides, 0 keys and 1 values


def cheapest(costs: torch.Tensor, count: int) -> Choice:
    """costs [L−1,2] of pairing layers (l, l + 1), keys and values, infinite where that cannot be → `count` of (pair,
    side), or as many as there can be."""
    sides = [(0,), (1,), (0, 1)]
    none: dict[int, tuple[float, Choice]] = {0: (0.0, {})}
    history = [none, none]  # by number of layers: so many chosen → cost, choice
    for pair, cost in enumerate(costs.tolist()):
        best = dict(history[-1])
        for held, (total, choice) in history[-2].items():
            for which in sides:
                worth = total + sum(cost[side] for side in which)
                if worth < best.get(held + len(which), (float("inf"), {}))[0]:
                    best[held + len(which)] = (worth, choice | {pair: which})
        history.append(best)
    reachable = [held for held in history[-1] if held <= count]
    return history[-1][max(reachable)][1]


def deepest(layers: int, start: int, possible: torch.Tensor) -> Choice:
    """Pairs (start, start + 1), (start + 2, start + 3), … of keys and values, where bool [L−1] says they can be."""
    return {pair: (0, 1) for pair in range(start, layers - 1, 2) if possible[pair]}
