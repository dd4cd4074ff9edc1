"""How near attention stays, and how alike: which layers can take a short window, or read what another one chose?

    recent(w)   attention mass on the nearest w distances, the token itself included
    sink        attention mass on the first 4 positions
    window      the smallest w with recent(w) + sink ≥ 0.9 (ours), mean over the heads of a layer; none if no w has it

A decoder that looks at its own block alone in some layers works if it is trained so (Block Transformer, arXiv
2406.02657); a trained model is no such decoder, but its layers differ, and this says by how much. `worst` is
recent(w) + sink of the least local head at the layer's window, or at the widest where there is none: one head that
looks far is why a layer whose mean is local may still need everything. Sink and recent mass overlap in the rows that
are shorter than w, so that windows near the length of the texts are too small: compare profiles of equal length, of
several times the window of interest.

With `layer-overlap` in the trace: how much of what a layer looks at most the layer before looks at most too, and what a
choice by layer i finds of what layer j's own would (mass[i, j] / mass[j, j]; TidalDecode, arXiv 2410.05076). With
`jumps`: the same overlap from one token to the next, as a Jaccard index of a tenth of the entries, and the cosine of
the two queries (LouisKV, arXiv 2510.11292).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import Cell, Finding, cell, observed, plain, shown
from kvtool.statistics._base import bin_edges
from kvtool.statistics.jumps import BINS
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
    window = borders[first].double().masked_fill(~enough.any(1), float("nan"))
    layers = torch.arange(len(first))
    worst, which = held[layers, :, first].min(1)
    at = {width: int((borders == width).nonzero()) for width in WIDTHS}
    data: dict[str, Any] = {
        "enough": ENOUGH, "widths": list(WIDTHS), "recent": {str(w): plain(recent[..., i]) for w, i in at.items()},
        "sink": plain(sink), "window": [None if w != w else int(w) for w in window.tolist()], "worst": plain(worst),
        "worst_head": which.tolist(), "own_window": list(trace.geometry.windows),
    }  # fmt: skip
    columns = ("layer", *(f"recent {width}" for width in WIDTHS), "sink", "window", "worst", "of head")
    rows = []
    for layer in shown(trace.geometry.layers):
        near: list[Cell] = [cell(recent[layer, :, at[width]].mean()) for width in WIDTHS]
        own = cell(window[layer], 0)
        rows.append((layer, *near, cell(sink[layer].mean()), own, cell(worst[layer]), f"{layer}.{int(which[layer])}"))
    figures = {"locality": partial(_figure, borders, recent.mean(1))}
    made = Finding("locality", _headline(window, worst), columns, rows, data, figures)
    for name, counter, more in (("layer-overlap", "rows", _across), ("jumps", "count", _along)):
        if name in trace.statistics and bool(trace[name][counter].any()):
            made = _with(made, *more(trace))
    return made


More = tuple[str, torch.Tensor, str, dict[str, Any], dict[str, Callable[["Figure"], None]]]


def _with(
    finding: Finding, column: str, values: torch.Tensor, text: str, data: dict[str, Any], figures: Any
) -> Finding:
    """One more column, values [L], sentence, and so on."""
    return replace(
        finding,
        headline=f"{finding.headline} {text}".strip(),
        columns=(*finding.columns, column),
        rows=[(*row, cell(values[int(row[0])])) for row in finding.rows],
        data=finding.data | data,
        figures={**finding.figures, **figures},
    )


def _across(trace: Trace) -> More:
    """From layer to layer."""
    statistic, rows = observed(trace, "layer-overlap", "rows")
    nothing = torch.tensor([window is not None for window in trace.geometry.windows])
    hidden = nothing[:, None] | nothing
    mass = (statistic["mass"] / rows).masked_fill(hidden, float("nan"))
    overlap = (statistic["overlap"] / rows).masked_fill(hidden, float("nan"))
    found = mass / mass.diagonal()  # [i,j]: what i's choice finds in j, of what j's own would
    layers = [layer for layer in range(trace.geometry.layers) if not nothing[layer]]
    before = torch.full((trace.geometry.layers,), float("nan"), dtype=torch.float64)
    for low, high in pairwise(layers):
        before[high] = overlap[low, high]
    after = torch.stack([found[low, high] for low, high in pairwise(layers)]) if len(layers) > 1 else before[:0]
    text = "" if not len(after) else (
        f"What a layer looks at most finds {float(after.min()):.0%} to {float(after.max()):.0%} of what the next "
        "layer's own choice would."
    )  # fmt: skip
    lower = torch.ones_like(hidden).tril(-1)
    maps = {"same entries": overlap, "mass found ÷ own": found}
    shown_maps = {title: values.masked_fill(lower, float("nan")) for title, values in maps.items()}
    data = {"overlap": plain(overlap), "mass": plain(mass), "found": plain(found)}
    return "shared", before, text, data, {"locality-overlap": partial(_maps, shown_maps)}


def _along(trace: Trace) -> More:
    """From token to token."""
    count, overlap = trace["jumps"]["count"].sum(1), trace["jumps"]["overlap"].sum(1)
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * 2 - 1
    steps = count.sum(1)
    cosine, jaccard = (count * centres).sum(1) / steps, overlap.sum(1) / steps
    met = steps > 0  # layers with a window of their own count nothing
    text = (
        f"From one token to the next, the tenth looked at most has a Jaccard index of {_range(jaccard[met])}, queries "
        f"a cosine of {_range(cosine[met])}."
    )
    data = {"jaccard": plain(jaccard), "cosine": plain(cosine)}
    return "kept", jaccard, text, data, {"locality-steps": partial(_steps, cosine, jaccard)}


def _maps(maps: dict[str, torch.Tensor], figure: Figure) -> None:
    """[L,L] each: rows choose, columns read."""
    axes = draw.panels(figure, 1, len(maps), draw.WIDE, 2.9, sharey=True)
    draw.heats(figure, axes, maps, "share", draw.linear(), aspect="equal")
    axes[0].set_ylabel("layer that chooses")
    for axis in axes:
        axis.set_xlabel("layer that reads")
    draw.whole(*axes)


def _steps(cosine: torch.Tensor, jaccard: torch.Tensor, figure: Figure) -> None:
    """[L] each."""
    (axis,) = draw.panels(figure, 1, 1, draw.NARROW, 2.2)
    for index, (name, values) in enumerate((("cosine of queries", cosine), ("Jaccard of entries", jaccard))):
        axis.plot(range(len(values)), values, label=name, **draw.line(index))
    axis.set(
        xlabel="layer", ylabel="from token to token", ylim=(min(0.0, float(cosine.nan_to_num().min())) - 0.02, 1.02)
    )
    axis.legend()
    draw.whole(axis)


def _range(values: torch.Tensor) -> str:
    return f"{float(values.min()):.2f} to {float(values.max()):.2f}"


def _headline(window: torch.Tensor, worst: torch.Tensor) -> str:
    """window, worst [L]; NaN: no window holds enough."""
    local = ~window.isnan()
    without = int((~local).sum())
    if not local.any():
        return f"In none of the {len(window)} layers does a window hold {ENOUGH:.0%} of the attention."
    order = [int(layer) for layer in window.argsort(stable=True) if local[layer]]
    near, far = (", ".join(map(str, part)) for part in (order[:3], order[::-1][:3]))
    whole = int((worst[local] >= ENOUGH).sum())
    found = window[local]
    return (
        f"{ENOUGH:.0%} of the attention is on the first {SINK} tokens and the nearest {int(found.min())} to "
        f"{int(found.max())}, by layer: nearest in {near}, farthest in {far}; in {whole} of {len(window)} layers that "
        f"holds for every head" + (f", and in {without} no window holds so much." if without else ".")
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
