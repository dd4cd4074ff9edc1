"""A scoreboard's JSON as a table for docs/scoreboard.md: python benchmarks/scoreboard.py scoreboard.json [LENGTH]

It runs nothing; `kvtool compare` made the file. Rows stand by budget, then by what they recall. Recall is known/after.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("", "bytes", "passkey", "needle", "two-hop", "perplexity ×", "KL", "top-1", "prefill ×", "calibration")


def main(path: str, length: str | None) -> None:
    board = json.loads(Path(path).read_text())
    rows = [row for row in board["rows"] if not row["skipped"]]
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"| {' | '.join('---' for _ in COLUMNS)} |")
    for row in sorted(rows, key=lambda row: _order(row, length)):
        print(f"| {' | '.join(_cells(row, length))} |")


def _found(row: dict[str, Any], length: str | None) -> dict[str, Any]:
    return row["all"] if length is None else row["lengths"].get(length, {})


def _order(row: dict[str, Any], length: str | None) -> tuple[float, float, str]:
    found = _found(row, length)
    quality = [found.get(f"quality_{ask}") or 0.0 for ask in ("known", "after")]
    return -(row["budget"] or (2.0 if row["kind"] == "control" else 1.0)), -sum(quality), row["name"]


def _cells(row: dict[str, Any], length: str | None) -> list[str]:
    found = _found(row, length)
    if row["error"] or not found:
        return [f"`{row['name']}`", row["error"] or "not run", *[""] * (len(COLUMNS) - 2)]
    text, seconds = found["known"].get("text", {}), row["calibration_seconds"]
    return [
        f"`{row['name']}`",
        f"{found['bytes_ratio']:.3f}",
        *(_recall(found, task) for task in ("passkey", "needle", "two-hop")),
        *(f"{text[name]:.3f}" if name in text else "" for name in ("perplexity_ratio", "kl", "agreement")),
        f"{found['prefill_ratio']:.2f}",
        "" if seconds is None else "none" if seconds < 1 else f"{seconds:.0f} s",
    ]


def _recall(found: dict[str, Any], task: str) -> str:
    shares = [found.get(ask, {}).get(task, {}).get("recall") for ask in ("known", "after")]
    return "/".join("–" if share is None else f"{share:.2f}" for share in shares)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None)
