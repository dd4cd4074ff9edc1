"""Plans are made once, found again, and trained once for all budgets; one that cannot be made is one row's trouble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtool import plan
from kvtool.compare.cells import Cell, cells
from kvtool.compare.plans import Shelf
from kvtool.errors import InputError
from kvtool.methods import duo
from kvtool.model import Model
from kvtool.trace import Trace
from tests.replay.conftest import windowed

DUO: dict[str, Any] = {"steps": 2, "lengths": (200,), "passkeys": 1, "sink": 2, "recent": 8}


def nothing(statistics: set[str]) -> Trace:
    raise InputError("no trace to be had")


@pytest.fixture
def shelf(model: Model, tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "board.plans", model, 0, nothing)


def rows(*methods: str, budgets: tuple[float, ...] = (0.5, 0.2), **settings: Any) -> list[Cell]:
    return [cell for cell in cells(methods, budgets, settings, {}) if cell.kind == "method"]


def test_a_plan_is_made_once(shelf: Shelf) -> None:
    wanted = rows("snapkv")
    assert shelf.missing(wanted) == wanted
    first = [shelf.entrant(cell) for cell in wanted]
    assert shelf.missing(wanted) == []
    again = [shelf.entrant(cell) for cell in wanted]
    assert [(e.identity, e.seconds, e.path) for e in again] == [(e.identity, e.seconds, e.path) for e in first]
    assert all(entrant.seconds is not None and not entrant.trouble for entrant in first)
    assert first[0].identity != first[1].identity
    assert [plan.read(entrant.path).options["budget"] for entrant in first] == [0.5, 0.2]


def test_other_options_are_another_plan(shelf: Shelf, model: Model) -> None:
    (cell,) = rows("snapkv", budgets=(0.5,))
    shelf.entrant(cell)
    (other,) = rows("snapkv", budgets=(0.5,), snapkv={"window": "8"})
    assert shelf.missing([other]) == [other]
    assert Shelf(shelf.folder, model, 1, nothing).missing([cell]) == [cell]
    shelf._path(cell).write_bytes(b"damaged")
    assert shelf.missing([cell]) == [cell]


def test_what_trains_trains_once_for_all_budgets(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], duo.train
    monkeypatch.setattr(duo, "train", lambda *given: trained.append(1) or train(*given))  # type: ignore[func-returns-value]
    found = [shelf.entrant(cell) for cell in rows("duo", duo=DUO)]
    assert [entrant.trouble for entrant in found] == ["", ""]
    assert len(trained) == 1
    first, second = (plan.read(entrant.path) for entrant in found)
    assert second.evidence["alpha"].equal(first.evidence["alpha"])
    assert second.options["full"] < first.options["full"]
    assert shelf.missing(rows("duo", duo=DUO)) == []
    shelf.entrant(rows("duo", budgets=(0.9,), duo=DUO)[0])  # a larger budget, later
    assert len(trained) == 1
    shelf.entrant(rows("duo", budgets=(0.9,), duo=DUO | {"steps": 3})[0])
    assert len(trained) == 2


def test_trouble_is_kept_to_one_row(shelf: Shelf, model: Model, tmp_path: Path) -> None:
    assert "group" in shelf.entrant(Cell("kivi", "method", 0.5)).trouble  # groups of 32 channels, heads of 8
    assert shelf.entrant(Cell("razor", "method", 0.5)).trouble == "no trace to be had."
    assert shelf.entrant(Cell("snapkv", "method", 0.5, trouble="cannot.")).trouble == "cannot."
    assert "no such file" in shelf.entrant(Cell("gone", "plan", path=str(tmp_path / "gone"))).trouble
    drafting = shelf.entrant(Cell("draft", "method"))
    assert drafting.skipped
    assert "only drafts" in drafting.trouble


def test_controls_and_ready_plans(shelf: Shelf, model: Model, tmp_path: Path) -> None:
    assert shelf.entrant(Cell("full", "control")).plan is None
    drawn = shelf.entrant(Cell("random", "control", 0.5))
    assert drawn.plan is not None
    assert drawn.path == ""
    path = windowed(model).write(str(tmp_path / "mine.plan.safetensors"))
    ready = shelf.entrant(Cell("mine", "plan", path=path))
    assert ready.plan is not None
    assert ready.plan.method == "by hand"
