"""How alike layers are, and how much each changes the residual stream.

    neighbours  mean over tokens of cos(x_l, x_{l+1}) of keys and of values, per KV head: can two layers share
                their entries token by token? (MiniCache, arXiv 2405.14366)
    importance  1 − cos(x, x + attention(x)) and 1 − cos(x, layer(x)): what dropping it would lose (LLM-Drop,
                arXiv 2406.15786); only the order within a model means something
    overlap     layer × layer, of the subspaces of C/8 dimensions that hold most of the keys before RoPE or of
                the values: 1 = the same, 0 = chance (see `_similarity`). It asks whether one low-rank basis
                serves both layers as they are: nothing centred, channels by index, permuted heads unlike
    cka         layer × layer, of the relations between tokens, in whatever basis (linear CKA, arXiv
                1905.00414), from the raw blocks of `reservoir` if the trace holds it. Its keys are after
                RoPE; the rotation, which all layers share, makes keys more alike than values

Cosine and overlap near 0 with a high CKA: layers know the same of their tokens and write it in other bases.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import NOTHING, Cell, Finding, cell, observed, plain, shown
from kvtool.analyze._similarity import cka, overlap, rank_of
from kvtool.statistics.reservoir import FREE
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("neighbours", "residual", "gram")
SIDES = {"k": "keys", "v": "values"}
CHANGES = ("1−cos attn", "1−cos layer")
MATRICES = {"overlap_k": "overlap K", "overlap_v": "overlap V", "cka_k": "CKA K", "cka_v": "CKA V"}
COLUMNS = ("layer", *CHANGES, "cos K", "cos V", *MATRICES.values())

Matrices = dict[str, torch.Tensor]


def find(trace: Trace) -> Finding:
    trace.need(*STATISTICS)
    statistic, tokens = observed(trace, "neighbours", "tokens")
    cosines = {side: statistic[side] / tokens for side in SIDES}  # [L−1,K]
    residual, tokens = observed(trace, "residual", "tokens")
    importance = {part: 1 - residual[part] / tokens for part in ("attention", "layer")}  # [L]
    gram, _ = observed(trace, "gram", "tokens")
    matrices = {"overlap_k": overlap(gram["k_pre"]), "overlap_v": overlap(gram["v"])}
    if "reservoir" in trace.statistics:
        taken = trace["reservoir"]["priority"] != FREE
        matrices |= {f"cka_{side}": cka(trace["reservoir"][side][taken]) for side in SIDES if taken.any()}
    by_use = importance["attention"].argsort(stable=True)
    data: dict[str, Any] = {
        "neighbours": {side: plain(values) for side, values in cosines.items()},
        "importance": {part: plain(values) for part, values in importance.items()},
        "least_important_attention": plain(by_use),
        "overlap_rank": rank_of(gram["v"]),
        "similarity": {name: plain(values) for name, values in matrices.items()},
    }
    rows = [_row(layer, cosines, importance, matrices) for layer in shown(trace.geometry.layers)]
    figures = {
        "layers-change": partial(_change, cosines, importance),
        "layers-similarity": partial(_similarity, matrices),
    }
    return Finding("layers", _headline(cosines, matrices, by_use), COLUMNS, rows, data, figures)


def _row(layer: int, cosines: Matrices, importance: Matrices, matrices: Matrices) -> tuple[Cell, ...]:
    """One layer; what compares two layers compares this one with the next."""
    more = layer + 1 < len(importance["layer"])
    change = [cell(importance[part][layer], 3) for part in ("attention", "layer")]
    near = [cell(cosines[side][layer].mean()) if more else NOTHING for side in SIDES]
    alike = [cell(matrices[name][layer, layer + 1]) if more and name in matrices else NOTHING for name in MATRICES]
    return (layer, *change, *near, *alike)


def _headline(cosines: Matrices, matrices: Matrices, by_use: torch.Tensor) -> str:
    text = f"Attention changes the stream least in layers {', '.join(str(int(layer)) for layer in by_use[:3])}"
    if cosines["k"].numel():
        k, v = (cell(values.mean()) for values in cosines.values())
        text += f"; adjacent layers: cosine {k} of keys and {v} of values"
        for name, label in (("overlap", "subspace overlap"), ("cka", "CKA")):
            if f"{name}_k" in matrices:
                k, v = (cell(matrices[f"{name}_{side}"].diagonal(1).mean()) for side in SIDES)
                text += f", {label} {k} and {v}"
    return text + " (means)."


def _change(cosines: Matrices, importance: Matrices, figure: Figure) -> None:
    upper, lower = draw.panels(figure, 2, 1, draw.WIDE, 3.6, sharex=True)
    for index, (side, label) in enumerate(SIDES.items()):
        between = torch.arange(len(cosines[side])) + 0.5
        ink, mark = draw.INKS[index], draw.MARKS[index]
        for head in range(cosines[side].shape[1]):
            upper.plot(between, cosines[side][:, head], mark, color=ink, alpha=0.4, markeredgewidth=0)
        upper.plot(between, cosines[side].mean(1), color=ink, linestyle=draw.DASHES[index], label=label)
    upper.axhline(0, color="0.7", linewidth=0.5, zorder=0)
    upper.set_ylabel("cosine of adjacent layers")
    upper.legend(ncols=2, title="mean over KV heads (dots: each)", title_fontsize=7)
    for index, (part, values) in enumerate(importance.items()):
        label = {"attention": "attention alone", "layer": "whole layer"}[part]
        lower.plot(values.clamp_min(1e-6), label=label, **draw.line(index))
    lower.set_yscale("log")
    lower.set(xlabel="layer", ylabel="change 1 − cos")
    lower.legend(ncols=2)
    draw.whole(lower)


def _similarity(matrices: Matrices, figure: Figure) -> None:
    """A line of matrices per kind, with its own scale. The diagonal is 1 by definition and left white."""
    kinds = {"overlap": ("subspace overlap S", "before RoPE"), "cka": ("debiased CKA", "after RoPE")}
    lines = len(matrices) // 2
    axes = draw.panels(figure, lines, 2, 5.6, 0.3 + 2.4 * lines, sharex=True, sharey=True)
    for line, (kind, (label, stage)) in enumerate(list(kinds.items())[:lines]):
        pair = {f"keys {stage}": matrices[f"{kind}_k"], "values": matrices[f"{kind}_v"]}
        bare = {title: values.clone().fill_diagonal_(torch.nan) for title, values in pair.items()}
        most = max([0.1, *(float(values.nan_to_num(0).max()) for values in bare.values())])
        draw.heats(figure, axes[2 * line : 2 * line + 2], bare, label, draw.linear(most), aspect="equal")
        axes[2 * line].set_ylabel("layer")
    draw.whole(*axes)
    for axis in axes[-2:]:
        axis.set_xlabel("layer")
