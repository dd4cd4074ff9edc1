"""`kvtool merge`: traces of one model → their sum."""

from __future__ import annotations

from typing import Any

from kvtool import files, trace
from kvtool.errors import InputError


def run(paths: list[str], output: str, force: bool) -> dict[str, Any]:
    """Returns the record that `--json` prints."""
    files.check_output(output, force=force)
    if len(paths) < 2:
        raise InputError("nothing to merge", got=f"{len(paths)} trace", expected="two or more")
    files.one_stdin(*paths)
    total = trace.read(paths[0])
    for path in paths[1:]:
        total.merge(trace.read(path))
    total.write(output, force=force)
    return {"output": output, "kind": "trace", "statistics": sorted(total.statistics), "parts": len(paths)}
