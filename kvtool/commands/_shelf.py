"""Ready-made plans, which commands know by their names."""

from __future__ import annotations

from pathlib import Path

from kvtool.errors import InputError

SHELVES = (Path(__file__).parents[2] / "calibrations", Path(__file__).parents[1] / "calibrations")  # checkout, wheel


def find(path: str) -> str:
    """A plan's path, or the path of the ready-made plan of that name; raises InputError when there is neither."""
    if path == "-" or Path(path).exists():
        return path
    ready = {
        file.name.removesuffix(".plan.safetensors"): file
        for shelf in SHELVES
        for file in shelf.glob("*.plan.safetensors")
    }
    if path not in ready:
        raise InputError(
            "no such plan", got=path, expected="a file" + (f", or one of {', '.join(sorted(ready))}" if ready else "")
        )
    return str(ready[path])
