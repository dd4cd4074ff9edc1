"""Dealing bytes among units that each have a few ways to be held: the lower convex hull, then greedily by slope.

    minimise Σ_u error[u, c_u]   such that   Σ_u bytes[u, c_u] ≤ budget

Every unit starts at its cheapest way and climbs its own convex hull; the step that saves most error a byte is taken
first, and steps that no longer fit are passed over, with those behind them. As long as nothing is passed over the
result is the best one for the bytes it spends (the steps are those of a Lagrangian); after that it is off by less than
one step. Errors are taken to add up over units: whoever measures them must check that. It knows nothing of caches.

Choices may hang together. A unit is a tree of three kinds:

    Ways     one of N ways                                 hull: of its points
    Each     every part chooses for itself                 hull: the sum of the parts' hulls, their steps by slope
    Either   one of the parts is taken, with its choices   hull: the lower convex envelope of the parts' hulls

For every price λ of a byte min (error + λ·bytes) of an `Each` is the sum of its parts' minima and that of an `Either`
the least of them, and a lower convex hull is nothing but these minima. So the corners of a tree's hull, each with the
choice that led to it, are the choices that are best at some price, and dealing among trees is dealing among units.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from kvtool.errors import InputError

Curves = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Ways:
    """size, error: fp64 [N]. name: what the choice is told by."""

    name: Hashable
    size: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class Each:
    parts: tuple[Unit, ...]


@dataclass(frozen=True)
class Either:
    """Of parts that are as good the first."""

    parts: tuple[Unit, ...]


Unit = Ways | Each | Either


class Corner(NamedTuple):
    """One choice: `picks` has the way of every `Ways` that takes part."""

    size: float
    error: float
    picks: dict[Hashable, int]


@dataclass(frozen=True)
class Dealt:
    """picks: the way of every `Ways` that takes part. path fp64 [P,2]: bytes and error in sum after every step."""

    picks: dict[Hashable, int]
    path: torch.Tensor

    @property
    def spent(self) -> float:
        return float(self.path[-1, 0])

    @property
    def error(self) -> float:
        return float(self.path[-1, 1])


@dataclass(frozen=True)
class Allocation(Dealt):
    """choice int64 [U]: the way of each unit."""

    choice: torch.Tensor


def hull(size: torch.Tensor, error: torch.Tensor) -> list[int]:
    """The ways fp64 [N] on the lower left convex hull, from the cheapest to the one that errs least; of equals the
    first."""
    return _hull(size.tolist(), error.tolist())


def _hull(size: list[float], error: list[float]) -> list[int]:
    kept: list[int] = []
    for way in sorted(range(len(size)), key=lambda way: (size[way], error[way], way)):
        if kept and error[way] >= error[kept[-1]]:
            continue  # costs as much or more, and errs as much or more
        while len(kept) > 1 and _slope(size, error, kept[-2], kept[-1]) <= _slope(size, error, kept[-2], way):
            kept.pop()
        kept.append(way)
    return kept


def _slope(size: list[float], error: list[float], low: int, high: int) -> float:
    """Error saved a byte."""
    return (error[low] - error[high]) / (size[high] - size[low])


def corners(unit: Unit) -> list[Corner]:
    """The lower left convex hull of a unit, from the cheapest choice to the one that errs least."""
    if isinstance(unit, Ways):
        size, error = unit.size.tolist(), unit.error.tolist()
        return [Corner(size[way], error[way], {unit.name: way}) for way in _hull(size, error)]
    parts = [corners(part) for part in unit.parts]
    if isinstance(unit, Either):
        every = [corner for part in parts for corner in part]
        return [every[at] for at in _hull([corner.size for corner in every], [corner.error for corner in every])]
    found = [_sum([part[0] for part in parts])]
    for part, at in _steps(parts):
        found.append(_step(found[-1], parts[part], at))
    return found


def _sum(parts: Sequence[Corner]) -> Corner:
    picks = {name: way for part in parts for name, way in part.picks.items()}
    return Corner(sum(part.size for part in parts), sum(part.error for part in parts), picks)


def _step(total: Corner, part: Sequence[Corner], at: int) -> Corner:
    """`total` when one part goes on to its corner `at`."""
    low, high = part[at - 1], part[at]
    left = {name: way for name, way in total.picks.items() if name not in low.picks}
    return Corner(total.size + high.size - low.size, total.error + high.error - low.error, left | high.picks)


def _steps(parts: Sequence[Sequence[Corner]]) -> Iterator[tuple[int, int]]:
    """(part, corner) of all corners but the first ones, those that save most error a byte first, a part's own in order:
    where slopes are equal rounding may make a later one the steeper, and nothing is reached that is not climbed to."""
    found = []
    for number, part in enumerate(parts):
        slope = -math.inf
        for at, (low, high) in enumerate(pairwise(part), 1):
            slope = max(slope, (high.error - low.error) / (high.size - low.size))
            found.append((slope, number, at))
    return ((number, at) for _, number, at in sorted(found))


def deal(units: Sequence[Unit], budget: float) -> Dealt:
    """Raises InputError when the cheapest ways together exceed the budget."""
    parts = [corners(unit) for unit in units]
    at = [0] * len(parts)
    total = _sum([part[0] for part in parts])
    if total.size > budget * (1 + 1e-9):
        raise InputError("the budget is below what the cheapest encodings take", got=f"{budget:.4g}",
                         expected=f"{total.size:.4g} or more")  # fmt: skip
    path = [total[:2]]
    for number, step in _steps(parts):
        if step == at[number] + 1:
            after = _step(total, parts[number], step)
            if after.size <= budget * (1 + 1e-9):
                total, at[number] = after, step
                path.append(total[:2])
    return Dealt(total.picks, torch.tensor(path, dtype=torch.float64))


def allocate(size: Curves, error: Curves, budget: float) -> Allocation:
    """As `deal`, among units without a tree: size and error fp64 [N] of each."""
    made = deal([Ways(unit, *pair) for unit, pair in enumerate(zip(size, error, strict=True))], budget)
    return Allocation(made.picks, made.path, torch.tensor([made.picks[unit] for unit in range(len(size))]))
