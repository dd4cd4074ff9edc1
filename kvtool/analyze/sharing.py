"""Where adjacent layers can share what they write: one low-rank basis, or one direction, for several of them.

    basis   the error of one basis for n layers relative to that of n bases of their own, when both store as many
            numbers a token: ρ = n·C/4 of all channels against C/4 of each layer's; entries scaled to equal energy
            layer by layer, keys before RoPE (xKV, arXiv 2503.18893). Below 1 sharing pays; 1: nothing is shared
    arc     the error of the best common direction of two layers' entries, lengths kept, relative to their energy
            (MiniCache, arXiv 2405.14366), if the trace holds `slerp`; entries at right angles err by 2 − √2 = 0.59

Layers that read a residual stream which changes little write what they see of it in bases of their own: entries at
right angles, and yet one basis for all. Errors are of the profiled text itself, which a basis of many layers fits more
closely than other text: take far more tokens than n·C. They are of entries, not of attention.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import NOTHING, Cell, Finding, cell, observed, plain, shown
from kvtool.statistics.cross_gram import joint
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("gram", "cross-gram")
SIDES = {"k_pre": "K", "v": "V"}
COUNTS = (2, 4)  # layers in a group
SHARE = 4  # of the numbers one in so many is stored
COLUMNS = ("layers", *(f"{side} basis/{count}" for side in SIDES.values() for count in COUNTS), "K arc", "V arc")

Ratios = dict[tuple[str, int], torch.Tensor]  # side, layers in a group → of the group that begins at each layer


def find(trace: Trace) -> Finding:
    gram, tokens = observed(trace, "gram", "tokens")
    cross, _ = observed(trace, "cross-gram", "tokens")
    layers = trace.geometry.layers
    ratios: Ratios = {}
    for side in SIDES:
        for count in COUNTS:
            found = torch.full((layers,), torch.nan, dtype=torch.float64)
            for first in range(0, layers - count + 1, 1 if count == min(COUNTS) else count):
                found[first] = ratio(joint(gram[side], cross[side], first, count) / tokens, count)
            ratios[side, count] = found
    arcs = _arcs(trace)
    data = {
        "basis": {f"{label}{count}": plain(ratios[side, count]) for side, label in SIDES.items() for count in COUNTS},
        "arc": {side: plain(values) for side, values in arcs.items()},
    }
    rows = [_row(layer, ratios, arcs) for layer in shown(layers) if layer < layers - 1]
    return Finding("sharing", _headline(ratios, arcs), COLUMNS, rows, data, {"sharing": partial(_figure, ratios)})


def ratio(moments: torch.Tensor, count: int) -> torch.Tensor:
    """Second moments [n·C,n·C] of n layers → the error of one basis over that of n, for as many numbers."""
    width = len(moments) // count
    size = moments.diagonal().unflatten(0, (count, width)).mean(1).sqrt()
    size = torch.where(size == 0, 1.0, size).repeat_interleave(width)
    unit = moments / size / size[:, None]
    rank = max(1, width // SHARE)
    together = torch.linalg.eigvalsh(unit)[: -count * rank].clamp_min(0).sum()
    blocks = torch.stack([unit[at : at + width, at : at + width] for at in range(0, len(unit), width)])
    apart = torch.linalg.eigvalsh(blocks)[:, :-rank].clamp_min(0).sum()
    return together / apart if float(apart) > 1e-9 * float(unit.trace()) else torch.tensor(1.0)  # neither loses any


def _arcs(trace: Trace) -> dict[str, torch.Tensor]:
    """Side → [L−1] relative error of the best direction; nothing without the statistic."""
    if "slerp" not in trace.statistics:
        return {}
    slerp, _ = observed(trace, "slerp", "tokens")
    energy = {side: slerp[f"{side}_energy"].sum(1) for side in "kv"}
    return {side: slerp[side].sum(1).amin(1) / energy[side].clamp_min(1e-300) for side in "kv"}


def _row(layer: int, ratios: Ratios, arcs: dict[str, torch.Tensor]) -> tuple[Cell, ...]:
    """The groups that begin at this layer."""
    bases = [float(ratios[side, count][layer]) for side in SIDES for count in COUNTS]
    cells = [cell(value) if value == value else NOTHING for value in bases]  # NaN: no group begins here
    return (layer, *cells, *(cell(arcs[side][layer]) if arcs else NOTHING for side in "kv"))


def _headline(ratios: Ratios, arcs: dict[str, torch.Tensor]) -> str:
    if not bool((~ratios["v", 2].isnan()).any()):
        return "One layer has nobody to share with."
    k, v = (cell(ratios[side, 2].nanmean()) for side in SIDES)
    text = f"One basis for two layers errs {k} times as much in keys and {v} times in values as two bases of their own"
    if bool((~ratios["v", 4].isnan()).any()):
        k, v = (cell(ratios[side, 4].nanmean()) for side in SIDES)
        text += f", one for four {k} and {v} times"
    if arcs:
        text += f"; one direction loses {cell(arcs['k'].mean())} and {cell(arcs['v'].mean())} of the energy"
    return text + " (means)."


def _figure(ratios: Ratios, figure: Figure) -> None:
    axes = draw.panels(figure, 1, 2, draw.WIDE, 2.4, sharey=True)
    titles = ("keys before RoPE", "values")
    for axis, side, title in zip(axes, SIDES, titles, strict=True):
        for index, count in enumerate(COUNTS):
            values = ratios[side, count]
            at = (~values.isnan()).nonzero().flatten()
            axis.plot(at + (count - 1) / 2, values[at], label=f"{count} layers", **draw.line(index))
        axis.axhline(1, color="0.7", linewidth=0.5, zorder=0)
        axis.set(title=title, xlabel="middle of the group, layer")
    axes[0].set(ylabel="error, one basis / bases apart")
    axes[0].legend()
