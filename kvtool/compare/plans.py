"""From cells to plans: read what is ready, calibrate the rest, and keep it in a folder beside the scoreboard.

A plan in the folder is taken if it is by the same method, options, seed and model; delete it to calibrate again. A
method that trains says with `REUSE` which of its options takes the path of an earlier plan instead, so that it trains
once for all budgets. Whatever goes wrong with one cell is that cell's trouble alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvtool import options, plan
from kvtool.calibrate import calibrate, method, reads
from kvtool.compare import cells as controls
from kvtool.compare.cells import Cell
from kvtool.errors import InputError
from kvtool.files import digest
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.trace import Trace

SUFFIX = ".plan.safetensors"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Entrant:
    """A cell and its plan; None is the full cache, unless there is `trouble`. `seconds`: of calibration, if known.
    `skipped`: is there nothing to compare, which is no failure?"""

    cell: Cell
    plan: Plan | None = None
    identity: str = ""
    path: str = ""
    seconds: float | None = None
    trouble: str = ""
    skipped: bool = False


class Shelf:
    """Plans for the cells of one comparison, kept in `folder`. `observe(statistics)` gives a trace that holds them.
    drafts: do all tasks say something about a cache that only drafts?"""

    def __init__(
        self, folder: Path, model: Model, seed: int, observe: Callable[[set[str]], Trace], *, drafts: bool = False
    ):
        self.folder, self.model, self.seed, self.observe, self.drafts = folder, model, seed, observe, drafts

    def entrant(self, cell: Cell, progress: Progress = lambda done, total, text: None) -> Entrant:
        """Read or make the cell's plan."""
        if cell.kind == "control" and cell.budget is None:
            return Entrant(cell, identity=controls.FULL)
        try:
            if cell.trouble:
                raise InputError(cell.trouble)
            found, path = self._plan(cell, progress)
            found.check(self.model.fingerprint)
        except Exception as error:
            return Entrant(cell, trouble=told(error))
        if text := self._idle(found):
            return Entrant(cell, found, path=path, trouble=text, skipped=True)
        identity = digest(Path(path).read_bytes()) if path else digest(repr(sorted(found.options.items())))
        return Entrant(cell, found, identity, path, found.provenance.get("seconds"))

    def _idle(self, found: Plan) -> str:
        """Why there is nothing to compare; empty if there is."""
        if found.draft is not None and not self.drafts:
            return "it only drafts: what it writes is the full cache's own"
        if found.draft is not None and found.draft.excerpt is not None:
            return "its draft has a prompt of its own, which no others share"
        read = found.read
        alone = read is not None and not (read.chooses or read.sparse or found.keep or found.store or found.draft)
        if alone and read is not None and read.documents is not None:
            return "it acts on documents that were read apart, and no task has any"
        return ""

    def missing(self, cells: list[Cell]) -> list[Cell]:
        """Those that are still to be calibrated."""
        return [cell for cell in cells if cell.kind == "method" and not cell.trouble and self._ready(cell) is None]

    def _plan(self, cell: Cell, progress: Progress) -> tuple[Plan, str]:
        if cell.kind == "control":
            assert cell.budget is not None
            return controls.random(self.model, cell.budget, self.seed), ""
        if cell.kind == "plan":
            return plan.read(cell.path), cell.path
        path = self._path(cell)
        ready = self._ready(cell)
        return ready or self._calibrated(cell, path, progress), str(path)

    def _calibrated(self, cell: Cell, path: Path, progress: Progress) -> Plan:
        module, values = method(cell.line), dict(cell.options)
        donor = self._donor(cell)
        if donor:
            values[module.REUSE] = donor
        needed = set(reads(module, options.build(module.Options, values, cell.line)))
        trace = self.observe(needed) if needed else None
        self.folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        state = path.with_name(f"{path.name}.part")
        made = calibrate(
            cell.line, values, model=self.model, trace=trace, seed=self.seed, state=state, progress=progress
        )
        seconds = time.perf_counter() - start
        made = replace(made, provenance={**made.provenance, "seconds": round(seconds, 3)})
        made.write(str(path), force=True)
        return made

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}{SUFFIX}"

    def _ready(self, cell: Cell) -> Plan | None:
        """The plan of this cell that an earlier run left."""
        found = _read(self._path(cell))
        return found if found is not None and self._fits(found, cell.line, cell.options) else None

    def _fits(self, found: Plan, name: str, values: Any) -> bool:
        """Is it what calibrating this method with these options would give, whatever it reused?"""
        module = method(name)
        wanted = options.record(options.build(module.Options, values, name))
        reused = getattr(module, "REUSE", None)
        if reused is not None and reused not in values:
            wanted[reused] = found.options.get(reused)
        same = found.method == name and found.options == wanted and found.provenance.get("seed") == self.seed
        return same and found.model == self.model.fingerprint

    def _donor(self, cell: Cell) -> str:
        """A plan that differs from the cell's in budget alone and was not itself made from another; "" if none."""
        module = method(cell.line)
        reused = getattr(module, "REUSE", None)
        if reused is None or reused in cell.options or cell.budget is None:
            return ""
        by_budget = module.at(cell.budget)
        for path in sorted(self.folder.glob(f"{cell.line}@*{SUFFIX}")):
            found = _read(path)
            if found is None or found.options.get(reused):
                continue
            values = {**cell.options, **{key: found.options.get(key) for key in by_budget}}
            if self._fits(found, cell.line, values):
                return str(path)
        return ""


def _read(path: Path) -> Plan | None:
    """A plan, or nothing where there is none or one of another version."""
    try:
        return plan.read(str(path)) if path.exists() else None
    except InputError:
        return None


def told(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
