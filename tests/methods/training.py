"""What every method that trains is held to: a calibration that was interrupted, and one that takes what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtool.calibrate import calibrate
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Select
from tests.tolerance import same


def interrupted(name: str, settings: dict[str, object], model: Model, folder: Path, at: int) -> list[int]:
    """A calibration stops when `at` steps are done, and resumes → the steps that it then says are done. The plan's file
    is, byte for byte, that of a calibration at one stretch."""

    def stop(done: int, total: int, text: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    state, seen = folder / "state", list[int]()
    with pytest.raises(KeyboardInterrupt):
        calibrate(name, settings, model=model, state=state, progress=stop)
    resumed = calibrate(name, settings, model=model, state=state, progress=lambda done, *_: seen.append(done))
    assert not state.exists()
    whole = calibrate(name, settings, model=model)
    resumed_bytes, whole_bytes = (
        Path(plan.write(str(folder / f"{number}"))).read_bytes() for number, plan in enumerate((resumed, whole))
    )
    assert resumed_bytes == whole_bytes
    return seen


def select(plan: Plan) -> Select:
    """What a plan selects by."""
    assert plan.keep is not None
    assert plan.keep.select is not None
    return plan.keep.select


def reused(make: Callable[..., Plan], folder: Path) -> Path:
    """A plan's file, from which a plan of another budget takes all tables."""
    plan = make(budget=0.5)
    path = Path(plan.write(str(folder / "plan")))
    again = make(budget=0.1, weights=str(path))
    assert float(select(again).budget[0, 0]) == pytest.approx(0.1)
    for name, table in select(plan).tables.items():
        same(select(again).tables[name], table)
    return path
