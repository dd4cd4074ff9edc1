"""Planted points whose front is known."""

from __future__ import annotations

import math
from itertools import permutations

import pytest

from kvtool.compare.pareto import Point, front

FRONT: list[Point] = [(0.1, 0.2), (0.25, 0.9), (0.5, 1.0)]
BEHIND: list[Point] = [(0.1, 0.1), (0.3, 0.9), (0.25, 0.5), (0.9, 1.0)]


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_the_front_is_found_in_any_order(order: tuple[int, ...]) -> None:
    points = [BEHIND[at] for at in order] + FRONT[::-1]
    assert [points[index] for index in front(points)] == FRONT


def test_equals_share_it_and_nan_never_is_on_it() -> None:
    points = [(0.5, 0.5), (0.5, 0.5), (0.1, math.nan), (math.nan, 1.0), (0.6, 0.5)]
    assert front(points) == [0, 1]
    assert front([]) == []
