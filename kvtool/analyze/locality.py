"""How near attention stays, layer by layer: which layers can take a short window?

    recent(w)   attention mass on the nearest w distances, the token itself included
    sink        attention mass on the first 4 positions
    window      the smallest w with recent(w) + sink ≥ 0.9 (ours), mean over the heads of a layer

A decoder that looks at its own block alone in some layers works if it is trained so (Block Transformer, arXiv
2406.02657); a trained model is no such decoder, but its layers differ, and this says by how much. `worst` is
recent(w) + sink of the least local head at the layer's window: one head that looks far is why a layer whose mean is
local may still need everything. Sink and recent mass overlap in the rows that are shorter than w, so that windows near
the length of the texts are too small: compare profiles of equal length, of several times the window of interest.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import NOTHING, Cell, Finding, cell, observed, plain, shown
from kvtool.statistics._base import bin_edges
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("attention",)
SINK, ENOUGH = 4, 0.9
WIDTHS = (16, 64, 256, 1024)  # distances; all are borders of the statistic's bins


def find(trace: Trace) -> Finding:
    statistic, tokens = observed(trace, "attention", "tokens")
    borders = torch.tensor(bin_edges()[1:])  # the widths that bins add up to
    recent = (statistic["distance"][..., :-1].cumsum(-1) / tokens).clamp(max=1.0)  # [L,H,borders]
    sink = statistic["columns"][..., :SINK].sum(-1) / tokens  # [L,H]
    held = (recent + sink[..., None]).clamp(max=1.0)
    enough = held.mean(1) >= ENOUGH  # [L,borders]
    first = torch.where(enough.any(1), enough.int().argmax(1), len(borders) - 1)
    window = borders[first]
    layers = torch.arange(len(first))
    worst, which = held[layers, :, first].min(1)
    at = {width: int((borders == width).nonzero()) for width in WIDTHS}
    data: dict[str, Any] = {
        "enough": ENOUGH, "widths": list(WIDTHS), "recent": {str(w): plain(recent[..., i]) for w, i in at.items()},
        "sink": plain(sink), "window": window.tolist(), "worst": plain(worst), "worst_head": which.tolist(),
        "own_window": list(trace.geometry.windows),
    }  # fmt: skip
    columns = ("layer", *(f"recent {width}" for width in WIDTHS), "sink", "window", "worst", "of head")
    rows = []
    for layer in shown(trace.geometry.layers):
        near: list[Cell] = [cell(recent[layer, :, at[width]].mean()) for width in WIDTHS]
        own = int(window[layer]) if bool(enough[layer].any()) else NOTHING
        rows.append((layer, *near, cell(sink[layer].mean()), own, cell(worst[layer]), f"{layer}.{int(which[layer])}"))
    figures = {"locality": partial(_figure, borders, recent.mean(1))}
    return Finding("locality", _headline(window, worst), columns, rows, data, figures)


def _headline(window: torch.Tensor, worst: torch.Tensor) -> str:
    order = window.argsort(stable=True)
    near, far = (", ".join(str(int(layer)) for layer in part) for part in (order[:3], order.flip(0)[:3]))
    whole = int((worst >= ENOUGH).sum())
    return (
        f"{ENOUGH:.0%} of the attention is on the first {SINK} tokens and the nearest {int(window.min())} to "
        f"{int(window.max())}, by layer: nearest in {near}, farthest in {far}; in {whole} of {len(window)} layers that "
        f"holds for every head."
    )


def _figure(borders: torch.Tensor, recent: torch.Tensor, figure: Figure) -> None:
    """recent [L,borders]: one line a layer."""
    (axis,) = draw.panels(figure, 1, 1, draw.NARROW, 2.6)
    used = max(1, int((recent < recent[:, -1:] - 1e-6).any(0).sum()) + 1)
    colours = draw.depth(len(recent))
    for layer, row in enumerate(recent):
        axis.plot(borders[:used], row[:used], color=colours(layer / max(1, len(recent) - 1)), linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="distance δ (tokens)", ylabel="attention mass nearer than δ", ylim=(0, 1.02))
    draw.depth_bar(figure, [axis], len(recent))
