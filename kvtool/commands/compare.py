"""`kvtool compare`: methods, budgets and plans on the same prompts → one scoreboard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvtool import files, options, registry, trace
from kvtool.analyze._figures import style
from kvtool.calibrate import method, reads
from kvtool.commands import _corpora
from kvtool.commands._console import note, progress
from kvtool.commands._scoreboard import show
from kvtool.commands._shelf import find
from kvtool.commands.calibrate import TEXT
from kvtool.commands.profile import take
from kvtool.compare import board, figure, jobs
from kvtool.compare.cells import Cell, cells, every_method, names, shares
from kvtool.compare.journal import Journal
from kvtool.compare.plans import SUFFIX, Entrant, Shelf
from kvtool.compare.prompts import ASKS, Prompt, chosen, prompts
from kvtool.compare.run import Race, Rules
from kvtool.errors import InputError, unknown
from kvtool.model import Model, load
from kvtool.replay.verdict import task
from kvtool.trace import Trace, statistic

DPI = 160
ALL = "all"
QUALITY = ("passkey", "needle")  # what the figure draws unless told
FILES = ("json", "csv", "png", "jsonl")


@dataclass(frozen=True)
class Request:
    """The command line, as it was typed."""

    model: str
    output: str
    methods: str = ""
    budgets: str = "0.5,0.25,0.1"
    tasks: str = "text,passkey,needle,two-hop"
    lengths: str = "1000"
    ask: str = "known,after"
    quality: str | None = None
    settings: Sequence[str] = ()
    plans: Sequence[str] = ()
    trace: str | None = None
    strict: bool = False
    chunk: int = 512
    steps: int = 8
    jobs: int = 1
    resume: bool = False
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    force: bool = False

    def path(self, kind: str) -> Path:
        """One of the scoreboard's files."""
        return Path(f"{self.output}.{kind}")


@dataclass(frozen=True)
class Job:
    """What was asked for, read and checked."""

    cells: list[Cell]
    tasks: dict[str, Any]
    lengths: list[int]
    quality: list[str]
    rules: Rules


def run(request: Request) -> dict[str, Any]:
    """Returns the record that `--json` prints; `failed` in it names the rows that have an error instead of numbers."""
    job = _job(request)
    seen = None if request.trace is None else trace.read(request.trace)
    _make_room(request)
    model = load(request.model, dtype=request.dtype, device=request.device)
    made = prompts(model, job.tasks, job.lengths, request.seed)
    rules = job.rules
    journal = Journal(
        request.path("jsonl"),
        files.digest(repr((sorted(model.fingerprint.items()), request.dtype, rules.protocol, rules.chunk))),
    )
    try:
        field = _entrants(request, job, model, seen)
        race = Race(model, field, journal, rules)
        with progress("compare", race.units(made)) as advance:
            race.progress = advance
            if request.jobs == 1:
                race.run(made)
            else:
                jobs.run(
                    race, made, request.jobs, partial(load, request.model, dtype=request.dtype, device=request.device)
                )
    except KeyboardInterrupt:
        note(f"interrupted: --resume continues from {request.path('jsonl')}")
        raise
    record = _record(request, job, model, field, made, race)
    show(record)
    return record


def write(request: Request, record: dict[str, Any], document: str) -> list[str]:
    """Write the record, as JSON `document`, as a sheet and as a figure; returns their paths."""
    from matplotlib.figure import Figure  # slow to import, and mistakes should be told before

    with style():
        drawing, payload = Figure(layout="constrained"), io.BytesIO()
        figure.draw(drawing, record["rows"], record["asks"], "mean of " + " and ".join(record["quality"]))
        drawing.savefig(payload, dpi=DPI, format="png", bbox_inches="tight")
    contents = (document.encode(), board.sheet(record["rows"]).encode(), payload.getvalue())
    for kind, content in zip(FILES, contents, strict=False):
        files.replace(request.path(kind), content)
    return [str(request.path(kind)) for kind in FILES[:3]]


def _job(request: Request) -> Job:
    """Raise InputError, before any work, for everything that can be told from the command line alone."""
    tasks = names(request.tasks, "--tasks")
    methods = every_method() if request.methods == ALL else []
    if request.methods and not methods:
        methods = [registry.spelled(name) for name in names(request.methods, "--methods")]
    if not methods and not request.plans:
        raise InputError("nothing to compare", remedy="name --methods, or a --plan")
    budgets, known = shares(request.budgets), [*methods, *tasks]
    for name in methods:
        method(name)
    scoped = _corpora.scoped(list(request.settings))
    for scope in scoped:
        if scope not in known:
            raise InputError("a setting for what is not compared", got=scope, expected="one of " + ", ".join(known))
    rows, rules = cells(methods, budgets, scoped, _plans(request)), _rules(request)
    return Job(rows, chosen(tasks, scoped), _lengths(request), _quality(request, tasks), rules)


def _quality(request: Request, tasks: list[str]) -> list[str]:
    if request.quality is None:
        return [name for name in QUALITY if name in tasks] or tasks
    found = names(request.quality, "--quality")
    for name in found:
        if name not in tasks:
            raise InputError("--quality names a task that does not run", got=name, expected=" or ".join(tasks))
    return found


def _rules(request: Request) -> Rules:
    asks = names(request.ask, "--ask")
    for ask in asks:
        if ask not in ASKS:
            raise unknown("--ask", ask, ASKS)
    if request.chunk < 1 or request.steps < 0:
        raise InputError("bad --chunk or --steps", got=f"{request.chunk}, {request.steps}", expected=">= 1 and >= 0")
    if request.jobs < 1:
        raise InputError("bad --jobs", got=request.jobs, expected="a number of processes, at least 1")
    wanted = tuple(ask for ask in ASKS if ask in asks)
    return Rules(wanted, "strict" if request.strict else "official", request.chunk, request.steps)


def _lengths(request: Request) -> list[int]:
    found = list(options.convert(request.lengths, tuple[int, ...], "--lengths"))
    if min(found) < 2 or len(set(found)) < len(found):
        raise InputError("bad --lengths", got=request.lengths, expected="different numbers of tokens, like 1000,4000")
    return sorted(found)


def _plans(request: Request) -> dict[str, str]:
    """Name → path of the plans that are ready."""
    if "-" in request.plans:
        raise InputError("a plan to compare needs a name", got="--plan -", expected="a file")
    found = {Path(path).name.removesuffix(SUFFIX): find(path) for path in request.plans}
    if len(found) < len(request.plans):
        raise InputError("two plans have one name", got=", ".join(request.plans), remedy="rename one of the files")
    return found


def _make_room(request: Request) -> None:
    """May the outputs be written? With --force the journal of what was there before goes."""
    if request.output == "-":
        raise InputError("a scoreboard is several files", got="-o -", expected="what their names begin with")
    journal, folder, again = request.path("jsonl"), request.path("plans"), request.force or request.resume
    if journal.exists() and not again:
        raise InputError(f"{journal} exists already", remedy="pass --resume to go on from it, or --force to start over")
    for kind in FILES:
        files.check_output(request.path(kind), force=again)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder", remedy="choose another -o")
    if request.force and not request.resume:
        journal.unlink(missing_ok=True)


def _reads(cell: Cell) -> tuple[str, ...]:
    module = method(cell.line)
    return reads(module, options.build(module.Options, dict(cell.options), cell.line))


def _entrants(request: Request, job: Job, model: Model, seen: Trace | None) -> list[Entrant]:
    """A plan for every cell, made where there is none; later ones find what earlier ones trained."""
    folder, held = request.path("plans"), [] if seen is None else [seen]

    def observe(statistics: set[str]) -> Trace:
        """The trace that was given; or one of what all methods need, taken once."""
        if not held:
            wanted = set[str]().union(*(_reads(cell) for cell in missing))
            held.append(_observed(model, request, folder / "profile.trace.safetensors", wanted | statistics))
        return held[0]

    drafts = all(getattr(task(name), "DRAFTS", False) for name in job.tasks)
    shelf = Shelf(folder, model, request.seed, observe, drafts=drafts)
    missing, found = shelf.missing(job.cells), []
    with progress("calibrate", len(missing)) as advance:
        for cell in job.cells:
            entrant = shelf.entrant(cell, lambda done, total, text, cell=cell: advance(  # type: ignore[misc]
                f"{cell.key}: {text}", done=len(missing) and missing.index(cell), total=len(missing)
            ))  # fmt: skip
            if cell in missing:
                advance(cell.key)
            if entrant.trouble:
                note(f"{cell.key}: {entrant.trouble}")
            found.append(entrant)
    return found


def _observed(model: Model, request: Request, path: Path, statistics: set[str]) -> Trace:
    """The trace at `path`, if it holds these statistics of this model; else a new one."""
    if path.exists():
        old = trace.read(str(path))
        if old.model == model.fingerprint and old.complete and statistics <= set(old.statistics):
            return old
    parts = {name: statistic(name)(model, model.geometry) for name in statistics}
    seen = Trace(model.fingerprint, request.model, parts)
    take(model, seen, _corpora.build(model, {part.corpus for part in parts.values()}, TEXT, {}, request.seed), "-")
    path.parent.mkdir(exist_ok=True)
    seen.write(str(path), force=True)
    return seen


def _record(
    request: Request, job: Job, model: Model, field: Sequence[Entrant], made: Sequence[Prompt], race: Race
) -> dict[str, Any]:
    depths = {name: getattr(chosen, "depths", ()) for name, chosen in job.tasks.items()}
    rows = [
        board.record(
            entrant, made, race.journal, job.rules.asks, race.failed.get(entrant.cell.key, ""), job.quality, depths
        )
        for entrant in field
    ]
    return {
        "kind": "scoreboard",
        "model": model.name,
        "tasks": {name: options.record(chosen) for name, chosen in job.tasks.items()},
        "lengths": job.lengths,
        "prompts": len(made),
        "asks": list(job.rules.asks),
        "quality": job.quality,
        "protocol": job.rules.protocol,
        "chunk": job.rules.chunk,
        "dtype": request.dtype,
        "device": str(model.device),
        "seed": request.seed,
        "rows": rows,
        "failed": [row["name"] for row in rows if row["error"] and not row["skipped"]],
    }
