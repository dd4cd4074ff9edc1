"""Stderr for people: tables, progress, notes. Stdout is never touched here."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(stderr=True, highlight=False, soft_wrap=False)


def note(text: str) -> None:
    """One line for the person at the terminal."""
    console.print(text, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; numbers are set right and never broken, text left. In a file or a pipe a row is a line, however long."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(_NUMBER.fullmatch(row[index]) for row in cells) for index in range(len(columns))]
    room = console.width if console.is_terminal or "COLUMNS" in os.environ else sys.maxsize
    view = _view(columns, cells, numeric)
    if _extent(view).maximum > room:
        heads = [_stacked(name, index, cells) if numeric[index] else name for index, name in enumerate(columns)]
        view = _view(heads, cells, numeric)
    extent = _extent(view)
    view.width = min(extent.maximum, max(room, extent.minimum))  # a terminal that is narrower breaks lines by itself
    console.print(title, style="bold", markup=False, soft_wrap=True)
    with contextlib.nullcontext() if console.is_terminal else console.capture() as held:
        console.print(view, crop=False)
    if held is not None:
        note("\n".join(line.rstrip() for line in held.get().splitlines()))
    console.print()


def _view(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> Table:
    view = Table(box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    for name, fixed in zip(columns, numeric, strict=True):
        view.add_column(name, justify="right" if fixed else "left", overflow="fold", no_wrap=fixed)
    for row in cells:
        view.add_row(*row)
    return view


def _extent(view: Table) -> Measurement:
    return Measurement.get(console, console.options.update(width=sys.maxsize), view)


def _stacked(name: str, index: int, cells: Sequence[Sequence[str]]) -> str:
    """A column's name on as many lines as it takes not to be wider than its cells, or its longest word."""
    words = name.split()
    return "\n".join(textwrap.wrap(name, max(len(word) for word in [*words, "", *(row[index] for row in cells)]) or 1))


_NUMBER = re.compile(r"[-+]?[\d.,]+(/[\d.,]+)*(e[-+]?\d+)?[×%]?( [kMG]?B| [mµ]?s)?|–|")


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("[", "\\[")


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A bar on stderr, if that is a terminal."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("[dim]{task.fields[text]}"), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        yield Advance(bar, bar.add_task(what, total=total, text=""))


class Advance:
    """`advance(text)` is one step; `advance(text, done=…, total=…)` sets the bar."""

    def __init__(self, bar: Progress, task: TaskID):
        self.bar, self.task = bar, task

    def __call__(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        if done is None:
            self.bar.update(self.task, advance=1, text=text)
        else:
            self.bar.update(self.task, completed=done, total=total, text=text)


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def slug(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").split("/")[-1]).removesuffix(".gguf")
