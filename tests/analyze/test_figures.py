"""Axes that count layers and heads have whole numbers, however few there are."""

from __future__ import annotations

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvtool.analyze import _figures as draw


def ticks(axis: Axes) -> list[float]:
    return [float(tick) for tick in axis.get_yticks()]


@pytest.mark.parametrize("layers", [2, 3, 30])
def test_layers_are_counted(layers: int) -> None:
    figure = Figure(layout="constrained")
    axes = draw.panels(figure, 1, 2, draw.WIDE, 2.0, sharey=True)
    maps = {name: torch.rand(layers, 4) for name in "ab"}
    draw.heats(figure, axes, maps, "share", draw.linear())
    draw.depth_bar(figure, axes, layers)
    figure.draw_without_rendering()
    share, depth = figure.axes[2:]
    assert all(tick == round(tick) for axis in (*axes, depth) for tick in ticks(axis))
    assert len(ticks(axes[0])) > 1
    assert any(tick != round(tick) for tick in ticks(share))


def test_shares_of_a_sequence_are_not() -> None:
    figure = Figure(layout="constrained")
    axes = draw.panels(figure, 1, 1, draw.NARROW, 2.0)
    draw.heats(figure, axes, {"a": torch.rand(64, 64)}, "mass", draw.linear(), extent=(0, 1, 1, 0))
    figure.draw_without_rendering()
    assert any(tick != round(tick) for tick in ticks(axes[0]))
