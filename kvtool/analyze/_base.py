"""What a finding is: a headline, a table for the terminal, the full numbers, and figures.

An entry of this folder gives `STATISTICS` (what it reads from a trace) and `find(trace) -> Finding`. It only
reads: no model, no files, no plan. Nothing generic knows a finding by name.

Shapes: L layers, H query heads, K KV heads, D head dim, C = K·D channels of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvtool import registry
from kvtool.analyze._figures import style
from kvtool.errors import InputError
from kvtool.statistics._base import Statistic
from kvtool.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float
DPI = 150
LINES = 36  # lines of a per-layer table at most
NOTHING = "–"  # a cell without a value


@dataclass(frozen=True)
class Finding:
    """`columns` and `rows` are for a terminal of 100 columns, numbers already rounded; `data` is JSON-able
    and holds everything; `figures` maps a file stem to what draws it.
    """

    name: str
    headline: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    data: dict[str, Any]
    figures: Mapping[str, Callable[[Figure], None]] = field(default_factory=dict)


def run(trace: Trace, name: str) -> Finding:
    """The finding `name` in this trace. Raises InputError for an unknown name or a missing statistic."""
    return registry.module("analyze", name, "finding").find(trace)


def save_figures(finding: Finding, folder: str | Path, *, force: bool = False, dpi: int = DPI) -> list[str]:
    """Write the figures as PNG into `folder`, which is made if need be; returns their paths.

    Raises InputError when one exists already, before anything is written, unless `force`.
    """
    from matplotlib.figure import Figure  # slow to import, and tables do not need it

    paths = {stem: Path(folder) / f"{stem}.png" for stem in finding.figures}
    taken = [path for path in paths.values() if path.exists()]
    if taken and not force:
        raise InputError(f"{taken[0]} exists", remedy="pass --force to overwrite it, or name another folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for stem, draw in finding.figures.items():
            with style():
                figure = Figure(layout="constrained")
                draw(figure)
                figure.savefig(paths[stem], dpi=dpi)
    except OSError as error:
        raise InputError(f"cannot write figures to {folder}", got=error.strerror) from error
    return [str(path) for path in paths.values()]


def observed(trace: Trace, name: str, counter: str) -> tuple[Statistic, float]:
    """A statistic and how much it has seen by its accumulator `counter`. Raises InputError for nothing."""
    statistic = trace[name]
    count = float(statistic[counter])
    if not count:
        raise InputError(
            f"the trace's statistic {name!r} has seen nothing",
            remedy=f"profile again with its corpus, {statistic.corpus!r}",
        )
    return statistic, count


def plain(values: torch.Tensor, digits: int = 5) -> Any:
    """Tensor → nested lists for JSON, floats to `digits` significant digits, None for what is not finite."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(part) for part in value]
        if isinstance(value, float):
            return float(f"{value:.{digits}g}") if math.isfinite(value) else None
        return value

    return walk(values.tolist())


def cell(value: float | torch.Tensor, decimals: int = 2) -> Cell:
    """A number for the table, or a dash where there is none."""
    number = float(value)
    if not math.isfinite(number):
        return NOTHING
    return round(number, decimals) + 0.0 if decimals else round(number)  # + 0.0: no negative zero


def shown(layers: int) -> list[int]:
    """The layers a table has lines for: all, or every second, third, … and the last."""
    step = max(1, math.ceil(layers / LINES))
    return sorted({*range(0, layers, step), layers - 1})
