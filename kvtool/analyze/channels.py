"""Channels of keys and values far larger than the rest: what per-channel scales and outlier stores are for.

    magnitude   m_c = max over tokens |x_c|;   size   a_c = mean over tokens |x_c|
    outlier     m_c above OUTLIER times the median of m over all channels of the layer
    offset      |Σ x_c| / Σ |x_c|: 1 = the channel never changes its sign, so a zero point takes most of it

Keys before RoPE, keys after it, values. RoPE turns pairs of channels into each other: an offset before it is
a wave after it, and an outlier is shared out over its pair (KVQuant, arXiv 2401.18079; KIVI, 2402.02750);
pairs that turn slowly keep both. The threshold is ours. Where a maximum is the work of one token, the size is
near its median.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import Cell, Finding, cell, observed, plain
from kvtool.statistics._base import Statistic
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("channels",)
OUTLIER = 4.0
TOP = 10  # lines per kind
KINDS = {"k_pre": "K pre", "k": "K post", "v": "V"}
TITLES = {"k_pre": "keys before RoPE", "k": "keys after RoPE", "v": "values"}
COLUMNS = ("kind", "layer", "head", "channel", "max |x|", "max/median", "mean |x|", "mean/median", "offset")
FIELDS = ("kind", "layer", "head", "channel", "max", "peak", "mean", "ratio", "offset")


@dataclass(frozen=True)
class Channels:
    """Of one kind, [L,C] each: magnitude, size, their ratios to the layer's median, offset."""

    magnitude: torch.Tensor
    size: torch.Tensor
    peak: torch.Tensor
    ratio: torch.Tensor
    offset: torch.Tensor

    @property
    def outliers(self) -> list[tuple[int, int]]:
        """(layer, channel) above the threshold, the largest ratio first."""
        found = (self.peak > OUTLIER).nonzero().tolist()
        places = [(layer, channel) for layer, channel in found]
        return sorted(places, key=lambda place: -float(self.peak[place]))


def find(trace: Trace) -> Finding:
    statistic, tokens = observed(trace, "channels", "tokens")
    width = trace.geometry.head_dim
    kinds = {kind: measure(statistic, kind, tokens) for kind in KINDS}
    data = {
        "threshold": OUTLIER,
        "median": {kind: plain(found.magnitude.median(-1).values) for kind, found in kinds.items()},
        "magnitude": {kind: plain(found.magnitude.unflatten(1, (-1, width))) for kind, found in kinds.items()},
        "outliers": [
            dict(zip(FIELDS, _row(kind, found, place, width), strict=True))
            for kind, found in kinds.items()
            for place in found.outliers
        ],
    }
    rows = [_row(KINDS[kind], found, place, width) for kind, found in kinds.items() for place in found.outliers[:TOP]]
    figures = {"channels-magnitude": partial(_magnitude, {k: f.magnitude for k, f in kinds.items()}, width)}
    return Finding("channels", _headline(kinds), COLUMNS, rows, data, figures)


def measure(statistic: Statistic, kind: str, tokens: float) -> Channels:
    """Accumulators [L,K,D] of one kind → [L,C]."""
    magnitude = torch.maximum(-statistic[f"{kind}.min"], statistic[f"{kind}.max"]).flatten(1)
    total = statistic[f"{kind}.absolute"].flatten(1)
    offset = statistic[f"{kind}.sum"].flatten(1).abs() / total.clamp_min(1e-30)
    return Channels(magnitude, total / tokens, _relative(magnitude), _relative(total), offset)


def _relative(values: torch.Tensor) -> torch.Tensor:
    """[L,C] over the median of its layer."""
    return values / values.median(-1, keepdim=True).values.clamp_min(1e-30)


def _row(name: str, found: Channels, place: tuple[int, int], width: int) -> tuple[Cell, ...]:
    layer, channel = place
    numbers = (found.magnitude, found.peak, found.size, found.ratio, found.offset)
    return (name, layer, channel // width, channel % width, *(cell(values[place]) for values in numbers))


def _headline(kinds: dict[str, Channels]) -> str:
    parts = []
    for kind, found in kinds.items():
        part = f"{len(found.outliers)} in {TITLES[kind]}"
        if found.outliers:
            layer, channel = found.outliers[0]
            part += f" (to {float(found.peak[layer, channel]):.1f}×)"
        parts.append(part)
    total = kinds["k"].peak.numel()
    return f"Of {total} channels, more than {OUTLIER:g} times their layer's median: " + ", ".join(parts) + "."


def _magnitude(magnitudes: dict[str, torch.Tensor], width: int, figure: Figure) -> None:
    """[L,C] by kind; keys share one logarithmic scale, values have their own."""
    layers, channels = magnitudes["k"].shape
    height = 1.0 + 3 * max(1.0, 0.045 * layers)
    axes = draw.panels(figure, 3, 1, draw.WIDE, height, sharex=True, sharey=True)
    draw.heats(
        figure,
        axes[:2],
        {TITLES[kind]: magnitudes[kind] for kind in ("k_pre", "k")},
        "keys, max |x|",
        draw.logarithmic(magnitudes["k_pre"], magnitudes["k"]),
    )
    values = {TITLES["v"]: magnitudes["v"]}
    draw.heats(figure, axes[2:], values, "values, max |x|", draw.logarithmic(magnitudes["v"]))
    for axis in axes:
        draw.groups(axis, channels // width, width)
        axis.set_ylabel("layer")
    axes[-1].set_xticks(range(0, channels, width))
    axes[-1].set_xlabel(f"channel ({width} of each KV head)")
