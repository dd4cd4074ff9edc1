"""The figures of `heads`: score maps, attention by distance, attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvtool.analyze import _figures as draw
from kvtool.statistics._base import bin_edges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("retrieval", "induction", "echo", "sink")


def scores(found: dict[str, torch.Tensor], kv_heads: int, figure: Figure) -> None:
    """Heat maps layer × query head [L,H], lines between the groups of the KV heads."""
    shown = {name: found[name] for name in SHOWN if name in found}
    layers, heads = next(iter(shown.values())).shape
    width, height = min(draw.WIDE, 1.2 + 1.5 * len(shown)), 0.8 + 0.09 * max(layers, 12)
    axes = draw.panels(figure, 1, len(shown), width, height, sharey=True)
    draw.heats(figure, axes, shown, "score (share)", draw.linear())
    for axis in axes:
        draw.groups(axis, kv_heads, heads // kv_heads)
        axis.set_xlabel("query head")
    draw.whole(*axes)
    axes[0].set_ylabel("layer")


def distance(mass: torch.Tensor, kinds: torch.Tensor, names: Sequence[str], figure: Figure) -> None:
    """mass [L,H,BINS], share of attention by distance; the mean over each class of heads, summed up."""
    (axis,) = draw.panels(figure, 1, 1, draw.NARROW, 2.5)
    used = int((mass.sum((0, 1)) > 0).nonzero().max()) + 1
    beyond = torch.tensor([*bin_edges()[1:], 1 << 21])[:used]
    for index, name in enumerate(names):
        chosen = kinds == index
        if chosen.any():
            share = mass[chosen].mean(0)[:used].cumsum(0)
            label = f"{name} ({int(chosen.sum())})"
            axis.plot(beyond, share, color=draw.INKS[index], linestyle=draw.DASHES[index], label=label)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="distance δ (tokens)", ylabel="attention mass nearer than δ", ylim=(0, 1.02))
    axis.legend(title="class (heads)", title_fontsize=7, alignment="left")


def maps(found: dict[str, torch.Tensor], figure: Figure) -> None:
    """Attention maps [64,64] by title; each row of cells sums to 1."""
    lines = -(-len(found) // 3)
    axes = draw.panels(figure, lines, 3, draw.WIDE, 0.4 + 2.1 * lines, sharex=True, sharey=True)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    pictures = {title: cells.where(cells > 0, torch.nan) for title, cells in found.items()}
    norm = draw.logarithmic(torch.tensor([1e-4, 1.0]))
    label = "attention mass per cell"
    draw.heats(figure, axes[: len(found)], pictures, label, norm, extent=(0, 1, 1, 0), aspect="equal")
    figure.supxlabel("key position (share of the sequence)", fontsize=8)
    figure.supylabel("query position (share of the sequence)", fontsize=8)
