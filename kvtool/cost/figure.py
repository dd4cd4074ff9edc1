"""Four panels over context length, the full cache and the plan: users, prefill, decode step, context switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analyze._figures import WIDE, line, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("users", "users at once"),
    ("prefill", "prefill (s)"),
    ("step", "decode step (ms)"),
    ("switch", "switch (ms)"),
)
ROOM = 0.28  # of the axis, between two labels
SCALES = {"step": 1e3, "switch": 1e3}


def draw(figure: Figure, rows: Mapping[str, Sequence[dict[str, Any]]], even: Mapping[str, float | None]) -> None:
    """`rows`: for each cache, its costs by length, as in the record; `even`: its break-even length, marked in the panel
    of the decode step if it lies among the lengths."""
    axes = panels(figure, 1, len(PANELS), WIDE, 2.1, sharex=True)
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for index, (name, costs) in enumerate(rows.items()):
            shown = [
                (cost["tokens"], SCALES.get(key, 1.0) * cost[key]) for cost in costs if cost[key]
            ]  # no user at all has no logarithm
            axis.plot([x for x, _ in shown], [y for _, y in shown], label=name, **line(index))
        axis.set(xscale="log", yscale="log", title=label, xlabel="context (tokens)")
    tokens = sorted({cost["tokens"] for costs in rows.values() for cost in costs})
    axes[0].set_xticks(places := _apart(tokens), [_short(place) for place in places])
    axes[0].set_xticks([], minor=True)
    for index, name in enumerate(rows):
        where = even[name]
        if where is not None and min(tokens) <= where <= max(tokens):
            axes[2].axvline(where, color=line(index)["color"], linewidth=0.6, linestyle=(0, (4, 3)))
    axes[0].legend()


def _apart(tokens: Sequence[int]) -> list[int]:
    """Of rising lengths, those that are labelled: few enough to be read on a logarithmic axis."""
    chosen = [tokens[0]]
    for length in tokens[1:]:
        if length >= chosen[-1] * (tokens[-1] / tokens[0]) ** ROOM:
            chosen.append(length)
    return chosen


def _short(tokens: int) -> str:
    return f"{tokens / 1000:g}k" if tokens >= 1000 else str(tokens)
