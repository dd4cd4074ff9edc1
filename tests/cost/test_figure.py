"""The figure: lengths are named, and their names do not touch."""

from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from kvtool.cost.figure import PANELS, draw


@pytest.mark.parametrize(
    ("lengths", "names"),
    [
        ([1000, 4000], ["1k", "4k"]),
        ([500], ["500"]),
        ([1000, 1100, 4000, 16000, 64000, 128000], ["1k", "4k", "16k", "64k"]),
        ([1500, 2000, 2500, 3000, 3500], ["1.5k", "2k", "3k"]),
    ],
)
def test_lengths_are_named(lengths: list[int], names: list[str]) -> None:
    rows = {"full": [{"tokens": n, **{key: float(n) for key, _ in PANELS}} for n in lengths]}
    figure = Figure(layout="constrained")
    draw(figure, rows, {"full": None})
    figure.draw_without_rendering()
    for axis in figure.axes:
        labels = [label for label in axis.get_xticklabels(which="both") if label.get_text()]
        assert [label.get_text() for label in labels] == names
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
