"""A scoreboard's JSON as a table for docs/scoreboard.md.

python benchmarks/scoreboard.py scoreboard.json [LENGTH]     a line a row, by budget, then by what is recalled

It runs nothing; `kvtool compare` made the file. Recall is known/after. Acceptance is of greedy tokens / of drawn ones.
There are columns for what was run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RECALLED = ("passkey", "needle", "two-hop")
NUMBERS = {  # heading: task, metrics
    "perplexity ×": ("text", "perplexity_ratio"),
    "KL": ("text", "kl"),
    "top-1": ("text", "agreement"),
    "acceptance": ("acceptance", "acceptance", "sampled"),
}


def main(path: str, length: str | None) -> None:
    board = json.loads(Path(path).read_text())
    rows = [row for row in board["rows"] if not row["skipped"]]
    tasks = [task for task in RECALLED if any(_recalled(_found(row, length), task) for row in rows)]
    numbers = [name for name, (task, *_) in NUMBERS.items() if any(_tally(_found(row, length), task) for row in rows)]
    stepped = any(_found(row, length).get("decode_ratio") for row in rows)
    columns = ("", "bytes", *tasks, *numbers, "prefill ×", *["decode ×"] * stepped, "calibration")
    for cells in (columns, ["---"] * len(columns)):
        print(f"| {' | '.join(cells)} |")
    for row in sorted(rows, key=lambda row: _order(row, length)):
        cells = _cells(row, length, tasks, numbers, stepped)
        print(f"| {' | '.join([*cells, *[''] * (len(columns) - len(cells))])} |")


def _found(row: dict[str, Any], length: str | None) -> dict[str, Any]:
    return row.get("all", {}) if length is None else row.get("lengths", {}).get(length, {})


def _order(row: dict[str, Any], length: str | None) -> tuple[float, float, str]:
    found = _found(row, length)
    quality = [found.get(f"quality_{ask}") or 0.0 for ask in ("known", "after")]
    return -(row["budget"] or (2.0 if row["kind"] == "control" else 1.0)), -sum(quality), row["name"]


def _cells(row: dict[str, Any], length: str | None, tasks: list[str], numbers: list[str], stepped: bool) -> list[str]:
    found = _found(row, length)
    if row["error"] or not found:
        return [f"`{row['name']}`", row["error"] or "not run"]
    seconds, step = row["calibration_seconds"], found.get("decode_ratio")
    return [
        f"`{row['name']}`",
        f"{found['bytes_ratio']:.3f}",
        *(_recall(found, task) for task in tasks),
        *(
            "/".join(f"{_tally(found, task)[name]:.3f}" for name in names) if _tally(found, task) else ""
            for task, *names in map(NUMBERS.__getitem__, numbers)
        ),
        f"{found['prefill_ratio']:.2f}",
        *["" if step is None else f"{step:.2f}"] * stepped,
        "" if seconds is None else "none" if seconds < 1 else f"{seconds:.0f} s",
    ]


def _tally(found: dict[str, Any], task: str) -> dict[str, Any]:
    """Of a task without a question."""
    tally: dict[str, Any] = found.get("known", {}).get(task, {})
    return tally


def _recall(found: dict[str, Any], task: str) -> str:
    return "/".join("–" if share is None else f"{share:.2f}" for share in _shares(found, task))


def _recalled(found: dict[str, Any], task: str) -> bool:
    return any(share is not None for share in _shares(found, task))


def _shares(found: dict[str, Any], task: str) -> list[float | None]:
    return [found.get(ask, {}).get(task, {}).get("recall") for ask in ("known", "after")]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None)
