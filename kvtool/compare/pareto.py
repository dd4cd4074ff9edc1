"""The Pareto front: no other point is at least as good in quality and at most as large, and better in one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]  # bytes held ÷ full, quality


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points on the front, from few bytes to many. Of equal points all are on it; NaN never is."""
    order = [index for index, point in enumerate(points) if not any(map(math.isnan, point))]
    order.sort(key=lambda index: (points[index][0], -points[index][1]))
    found: list[int] = []
    for index in order:
        if not found or points[index][1] > points[found[-1]][1] or points[index] == points[found[-1]]:
            found.append(index)
    return found
