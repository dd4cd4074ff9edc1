"""The comparison by what plans would draft: those that only draft take part, if nothing else is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvtool.calibrate import calibrate
from kvtool.compare.board import record
from kvtool.compare.cells import Cell
from kvtool.compare.plans import Entrant, Shelf
from kvtool.compare.prompts import chosen, prompts
from kvtool.compare.run import Race
from kvtool.model import Model
from tests.compare.test_plans import nothing

SMALL = {"acceptance": {"samples": "2", "tokens": "9"}}


def test_acceptance_is_compared(model: Model, field: list[Entrant], race: Callable[..., Race]) -> None:
    made = prompts(model, chosen(("acceptance",), SMALL), (90,), 0)
    plan = calibrate("triforce", {"budget": 16}, model=model)
    tiers = [Entrant(Cell(name, "method"), one, identity=name)
             for name, one in (("triforce", plan), ("its cache", replace(plan, draft=None)))]  # fmt: skip
    started = race(entrants=[*field, *tiers], steps=2)
    started.run(made)
    assert started.failed == {}
    rows = {
        e.cell.key: record(e, made, started.journal, ("known", "after"), "", ["acceptance"], {})["all"]
        for e in [*field, *tiers]
    }
    found = {name: row["known"]["acceptance"] for name, row in rows.items()}
    assert found["full"] == {"acceptance": 1.0, "sampled": pytest.approx(1.0, abs=1e-5), "prompts": 2}
    assert found["triforce"] == found["its cache"]
    assert 0 < found["triforce"]["sampled"] < 1
    assert rows["full"]["quality_known"] == 1.0
    assert race(entrants=[*field, *tiers], steps=2).units(made) == 0  # all of it was written down
    assert max(row["forced_gap"] for row in rows.values()) < 1e-4


def test_who_is_compared(model: Model, tmp_path: Path) -> None:
    """A draft with a prompt of its own cannot adopt the prefill that all share."""
    for drafts, skipped in ((True, {"rapid"}), (False, {"draft", "rapid", "triforce"})):
        shelf = Shelf(tmp_path / "plans", model, 0, nothing, drafts=drafts)
        found = {name: shelf.entrant(Cell(name, "method")) for name in ("draft", "rapid", "triforce", "streaming")}
        assert {name for name, entrant in found.items() if entrant.skipped} == skipped
        assert {name for name, entrant in found.items() if entrant.trouble} == skipped


def test_documents_alone_are_not_compared(model: Model, tmp_path: Path) -> None:
    path = str(tmp_path / "ape.plan")
    calibrate("ape", {"mode": "given"}, model=model).write(path)
    entrant = Shelf(tmp_path / "plans", model, 0, nothing).entrant(Cell("ape", "plan", path=path))
    assert entrant.skipped
    assert "no task has any" in entrant.trouble
