"""Quality against bytes held: a panel per protocol, a line per method over its budgets, and the Pareto front.

Lines that reach the front are coloured and named where they do, up to as many as there are inks; the others are grey,
told apart by their marks in the legend beside the panels. The dashed level is the full cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvtool.analyze._figures import INKS, panels
from kvtool.compare.pareto import Point, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"known": "question known at compression", "after": "question asked after compression"}
MARKS = "osD^v<>phXP*d"
GREYS = ("0.45", "0.6", "0.72")
FULL = "full"


def draw(figure: Figure, rows: Sequence[dict[str, Any]], asks: Sequence[str], what: str) -> None:
    """rows as in the scoreboard's JSON; those that failed are left out. `what` names the quality."""
    shown = [row for row in rows if not row["error"]]
    lines = list(dict.fromkeys(row["line"] for row in shown if row["line"] != FULL))
    points = {ask: {row["name"]: _point(row, ask) for row in shown if row["line"] != FULL} for ask in asks}
    ahead = {ask: _ahead(points[ask]) for ask in asks}
    leaders = [line for line in lines if any(row["name"] in ahead[ask] for row in shown for ask in asks
                                             if row["line"] == line)]  # fmt: skip
    looks = _looks(lines, leaders)
    axes = panels(figure, 1, len(asks), 3.3 * len(asks) + 1.9, 3.6, sharey=True)
    for axis, ask in zip(axes, asks, strict=True):
        for line in lines:
            mine = sorted(points[ask][row["name"]] for row in shown if row["line"] == line)
            axis.plot(*zip(*mine, strict=True), label=line, **looks[line])
        _front(axis, points[ask], ahead[ask], {row["name"]: looks.get(row["line"], {}) for row in shown})
        whole = [row for row in shown if row["line"] == FULL]
        if whole:
            axis.axhline(_point(whole[0], ask)[1], color="0.3", linewidth=0.6, linestyle=(0, (4, 3)))
        axis.set_title(TITLES[ask])
        axis.set_xlabel("bytes held ÷ full cache")
        axis.set_xlim(0, 1.25 * max((x for x, _ in points[ask].values()), default=1.0))
        axis.set_ylim(-0.03, 1.06)
    axes[0].set_ylabel(what)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + len(lines) // 22)


def _point(row: dict[str, Any], ask: str) -> Point:
    quality = row["all"].get(f"quality_{ask}")
    return row["all"]["bytes_ratio"], float("nan") if quality is None else quality


def _ahead(points: dict[str, Point]) -> list[str]:
    """Names on the front, from few bytes to many; that what is worth nothing is small says nothing."""
    names = [name for name, (_, quality) in points.items() if quality > 0]
    return [names[index] for index in front([points[name] for name in names])]


def _looks(lines: Sequence[str], leaders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line → its look: inks for those that lead, greys and marks for the others."""
    found: dict[str, dict[str, Any]] = {}
    for index, line in enumerate(lines):
        mark = MARKS[index % len(MARKS)]
        if line in leaders:
            at = leaders.index(line)
            found[line] = {"color": INKS[at % (len(INKS) - 1)], "marker": mark, "zorder": 3}
        else:
            grey = GREYS[index // len(MARKS) % len(GREYS)]
            found[line] = {"color": grey, "marker": mark, "linewidth": 0.5, "markersize": 2.2, "zorder": 2}
    return found


def _front(axis: Axes, points: dict[str, Point], names: Sequence[str], looks: dict[str, dict[str, Any]]) -> None:
    """The front as steps, and its points by name, each label where it does not meet the one before."""
    if not names:
        return
    from matplotlib.patheffects import withStroke  # kept out of the start-up of commands that draw nothing

    xs, ys = zip(*(points[name] for name in names), strict=True)
    axis.step(xs, ys, where="post", color="0.2", linewidth=0.8, alpha=0.5, zorder=1)
    placed: list[Point] = []
    for name, x, y in zip(names, xs, ys, strict=True):
        level = y + 0.02
        while any(abs(level - other) < 0.045 and abs(x - at) < 0.3 for at, other in placed):
            level -= 0.05
        placed.append((x, level))
        axis.annotate(
            name, (x, y), (x + 0.015, level), fontsize=6, color=looks[name]["color"], va="center", zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
