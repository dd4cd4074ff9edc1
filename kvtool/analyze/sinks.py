"""Attention sinks and what comes with them: drained values, a logit gap, peaks in the residual stream.

One phenomenon seen four ways (arXiv 2410.13835), per layer and always about the first position:

    sink        mean over rows i > 0 of A[i, 0];   heads: share of (sequence, head) pairs above 0.3
    drain       ‖W_O^h v(0)‖ over its mean over the other tokens: below 1, the sink's value says little
    gap         logit of the first key minus the mean of the others
    peak        ‖x(0)‖, mean over sequences, over the largest other ‖x(t)‖ of all of them, before the layer
    massive     tokens a sequence whose largest |x| exceeds 100 times the layer's mean |x|

More than one massive token means that later tokens (delimiters, often) are sinks too; peak is then near 1.
Without a start token the first position is whatever the text began with.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from kvtool.analyze import _figures as draw
from kvtool.analyze._base import Cell, Finding, cell, observed, plain, shown
from kvtool.statistics.extremes import SINK
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATISTICS = ("extremes",)
TINY = 1e-30

Measures = dict[str, torch.Tensor]


def find(trace: Trace) -> Finding:
    found = measure(trace)
    data = {"threshold": SINK, **{name: plain(values) for name, values in found.items()}}
    columns = ("layer", "sink", "most", f"heads > {SINK}", "drain", "gap", "peak", "massive")
    rows = [_row(found, layer) for layer in shown(trace.geometry.layers)]
    top = int(found["peak"].argmax())
    where = f"before layer {top}" if top < trace.geometry.layers else "after the last layer"
    headline = (
        f"{100 * float(found['heads'].mean()):.0f} % of heads put more than {SINK} of their attention on the "
        f"first position (mean {float(found['sink'].mean()):.2f}); its values are "
        f"{float(found['drain'].median()):.2f} of the others' (median), its stream peaks at "
        f"{float(found['peak'].max()):.3g} times the next, {where}."
    )
    return Finding("sinks", headline, columns, rows, data, {"sinks": partial(_figure, found)})


def measure(trace: Trace) -> Measures:
    """sink, drain, gap [L,H]; heads [L]; peak, massive, first, rest [L+1], the last after the last layer."""
    statistic, sequences = observed(trace, "extremes", "sequences")
    first, rest = statistic["stream_first"] / sequences, statistic["stream_rest"]
    return {
        "sink": statistic["sink"] / sequences,
        "heads": statistic["sink_heads"].mean(1) / sequences,
        "drain": statistic["value_first"] / statistic["value_rest"].clamp_min(TINY),
        "gap": statistic["gap"] / sequences,
        "peak": first / rest.clamp_min(TINY),
        "massive": statistic["massive"] / sequences,
        "first": first,
        "rest": rest.clamp_min(0.0),  # −inf where every sequence is one token
    }


def _row(found: Measures, layer: int) -> tuple[Cell, ...]:
    sink, drain = found["sink"][layer], found["drain"][layer]
    shares = (cell(sink.mean()), cell(sink.max()), cell(found["heads"][layer]))
    others = (cell(drain.median()), cell(found["gap"][layer].mean(), 1))
    return (layer, *shares, *others, cell(found["peak"][layer]), cell(found["massive"][layer], 1))


def _figure(found: Measures, figure: Figure) -> None:
    axes = draw.panels(figure, 2, 2, draw.WIDE, 4.0, sharex=True)
    _dots(axes[0], found["sink"], found["sink"].mean(1), "mean")
    axes[0].axhline(SINK, color="0.6", linewidth=0.6, linestyle=":")
    axes[0].set(ylabel="attention to position 0", ylim=(-0.03, 1.03))
    _dots(axes[1], found["drain"].clamp_min(1e-3), found["drain"].median(1).values.clamp_min(1e-3), "median")
    axes[1].axhline(1, color="0.6", linewidth=0.6, linestyle=":")
    axes[1].set(ylabel="value norm, position 0 / others", yscale="log")
    _dots(axes[2], found["gap"], found["gap"].mean(1), "mean")
    axes[2].axhline(0, color="0.6", linewidth=0.6, linestyle=":")
    axes[2].set(ylabel="logit gap", xlabel="layer")
    for index, (name, label) in enumerate((("first", "position 0"), ("rest", "largest other"))):
        axes[3].plot(found[name], label=label, **draw.line(index))
    axes[3].set(ylabel="residual norm before layer", xlabel="layer", yscale="log")
    axes[3].legend()
    draw.whole(*axes[2:])


def _dots(axis: Axes, values: torch.Tensor, middle: torch.Tensor, label: str) -> None:
    """One dot a head, [L,H], and a line through the layers' middles [L]."""
    place = torch.arange(len(values))[:, None].expand_as(values)
    axis.plot(
        place.flatten(),
        values.flatten(),
        "o",
        color=draw.INKS[2],
        alpha=0.45,
        markersize=2.5,
        markeredgewidth=0,
    )
    axis.plot(middle, color=draw.INKS[0], label=f"{label} over heads")
    axis.legend()
