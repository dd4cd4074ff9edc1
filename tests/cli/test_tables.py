"""Tables for people: a row is a line where nobody looks on, numbers are never broken where somebody does."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kvtool.commands import _console

COLUMNS = ("layer", "rank 90/95/99", "rank effective", "held", "step", "what it is")
ROWS = [
    (0, "26/47/94", 16.25, "131.1 kB", "0.0366 µs", "The first layer, which is " + "very " * 20 + "much like others."),
    (1, "101/148/190", 7.5, "9.9 MB", "12 ms", "The [second] one."),
]


def drawn(monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    """Lines of the table without colours."""
    monkeypatch.delenv("COLUMNS", raising=False)
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=False, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(_console, "console", console)
    _console.table("a title", COLUMNS, ROWS)
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()  # type: ignore[attr-defined]


def test_in_a_file_a_row_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    title, head, first, second, blank = drawn(monkeypatch, width=80)
    assert (title, blank) == ("a title", "")
    assert "rank 90/95/99" in head
    assert ROWS[0][-1] in first
    assert "The [second] one." in second
    assert not any(line != line.rstrip() for line in (head, first, second))
    assert first.index("131.1 kB") + len("131.1 kB") == second.index("9.9 MB") + len("9.9 MB")


@pytest.mark.parametrize("width", [100, 60])
def test_in_a_terminal_numbers_stay_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch, width=width, force_terminal=True)
    text = "\n".join(lines)
    for cell in ("26/47/94", "101/148/190", "131.1 kB", "0.0366 µs", "12 ms"):
        assert cell in text
    assert len(lines) > 5  # words go over several lines
    assert max(map(len, lines)) <= width


def test_names_of_columns_go_over_lines_before_numbers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch, width=100, force_terminal=True)
    head = lines[1 : next(at for at, line in enumerate(lines) if line.lstrip().startswith("0 "))]
    assert [" ".join(line.split()) for line in head] == ["rank rank", "layer 90/95/99 effective held step what it is"]
