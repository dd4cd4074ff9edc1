"""`kvtool analyze`: a trace → findings as tables, JSON and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtool import registry, trace
from kvtool.analyze import _base
from kvtool.commands._console import note, table
from kvtool.errors import InputError


def run(path: str, names: list[str], figures: str | None, force: bool) -> dict[str, Any]:
    """All findings that the trace has statistics for, or those named; returns the record that `--json` prints."""
    seen = trace.read(path)
    findings = []
    for name in dict.fromkeys(names) or registry.names("analyze"):
        try:
            findings.append(_base.run(seen, name))
        except InputError as error:
            if names:
                raise
            note(f"skipped {name}: {error}")
    if not findings:
        raise InputError(f"{path} supports no finding", got=", ".join(sorted(seen.statistics)) or "no statistics")
    if figures is not None:
        _make_room(Path(figures), [stem for finding in findings for stem in finding.figures], force)
    if not seen.complete:
        note(f"note: the profile of {path} was interrupted; profile --resume would complete it")
    written: list[str] = []
    for finding in findings:
        table(finding.name, finding.columns, finding.rows)
        note(finding.headline + "\n")
        if figures is not None:
            written += _base.save_figures(finding, figures, force=force)
    record = {
        "kind": "findings",
        "trace": path,
        "findings": {f.name: {"headline": f.headline, **f.data} for f in findings},
    }
    return {**record, "figures": written}


def _make_room(folder: Path, stems: list[str], force: bool) -> None:
    """Raise InputError, before anything is drawn, when a figure exists already or the folder cannot be made."""
    taken = [path for path in (folder / f"{stem}.png" for stem in stems) if path.exists()]
    if taken and not force:
        raise InputError(f"{taken[0]} exists already", remedy="pass --force to overwrite it, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write figures to {folder}", got=error.strerror) from error
