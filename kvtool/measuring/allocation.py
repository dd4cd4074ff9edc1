"""Dealing bytes among units that each have a few ways to be held: the lower convex hull, then greedily by slope.

    minimise Σ_u error[u, c_u]   such that   Σ_u bytes[u, c_u] ≤ budget

Every unit starts at its cheapest way and climbs its own convex hull; the step that saves most error a byte is taken
first, and steps that no longer fit are passed over, with those behind them. As long as nothing is passed over the
result is the best one for the bytes it spends (the steps are those of a Lagrangian); after that it is off by less than
one step. Errors are taken to add up over units: whoever measures them must check that. It knows nothing of caches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtool.errors import InputError

Curves = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Allocation:
    """choice int64 [U]: the way of each unit. path fp64 [P,2]: bytes and error in sum after every step taken."""

    choice: torch.Tensor
    path: torch.Tensor

    @property
    def spent(self) -> float:
        return float(self.path[-1, 0])

    @property
    def error(self) -> float:
        return float(self.path[-1, 1])


def hull(size: torch.Tensor, error: torch.Tensor) -> list[int]:
    """The ways fp64 [N] on the lower left convex hull, from the cheapest to the one that errs least; of equals the
    first."""
    order = sorted(range(len(size)), key=lambda way: (float(size[way]), float(error[way]), way))
    kept: list[int] = []
    for way in order:
        if kept and error[way] >= error[kept[-1]]:
            continue  # costs as much or more, and errs as much or more
        while len(kept) > 1 and _slope(size, error, kept[-2], kept[-1]) <= _slope(size, error, kept[-2], way):
            kept.pop()
        kept.append(way)
    return kept


def _slope(size: torch.Tensor, error: torch.Tensor, low: int, high: int) -> float:
    """Error saved a byte."""
    return float((error[low] - error[high]) / (size[high] - size[low]))


def allocate(size: Curves, error: Curves, budget: float) -> Allocation:
    """size and error: fp64 [N] of every unit. Raises InputError when the cheapest ways together exceed the budget."""
    hulls = [hull(*pair) for pair in zip(size, error, strict=True)]
    at = [0] * len(hulls)
    spent = sum(float(size[unit][ways[0]]) for unit, ways in enumerate(hulls))
    total = sum(float(error[unit][ways[0]]) for unit, ways in enumerate(hulls))
    if spent > budget * (1 + 1e-9):
        raise InputError("the budget is below what the cheapest encodings take", got=f"{budget:.4g}",
                         expected=f"{spent:.4g} or more")  # fmt: skip
    path: list[tuple[float, float]] = [(spent, total)]
    steps: list[tuple[float, int]] = []
    for unit, ways in enumerate(hulls):
        _offer(steps, size, error, unit, ways, 0)
    while steps:
        _, unit = heapq.heappop(steps)
        low, high = hulls[unit][at[unit]], hulls[unit][at[unit] + 1]
        more = float(size[unit][high] - size[unit][low])
        if spent + more > budget * (1 + 1e-9):
            continue
        at[unit] += 1
        spent, total = spent + more, total + float(error[unit][high] - error[unit][low])
        path.append((spent, total))
        _offer(steps, size, error, unit, hulls[unit], at[unit])
    choice = torch.tensor([ways[step] for ways, step in zip(hulls, at, strict=True)])
    return Allocation(choice, torch.tensor(path, dtype=torch.float64))


def _offer(steps: list[tuple[float, int]], size: Curves, error: Curves, unit: int, ways: list[int], at: int) -> None:
    """The next step of a unit, if there is one, among those that wait."""
    if at + 1 < len(ways):
        heapq.heappush(steps, (-_slope(size[unit], error[unit], ways[at], ways[at + 1]), unit))
