"""`kvtool inspect`: explain any file that kvtool wrote."""

from __future__ import annotations

from typing import Any

from kvtool import files
from kvtool.commands._console import note, size, table

MOST = 40  # rows of tensors shown


def run(path: str) -> dict[str, Any]:
    """Returns the record that `--json` prints: the header, and each tensor's shape, dtype and bytes."""
    header, tensors = files.read(path)
    shapes: dict[str, dict[str, Any]] = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "bytes": t.nbytes}
        for name, t in sorted(tensors.items())
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    note(
        f"{path}: a {header['kind']}, schema {header['schema']}, written by kvtool {header['kvtool']}, {size(total)}\n"
    )
    model = header.get("model", {})
    facts: dict[str, object] = {f"model.{key}": _short(value) for key, value in model.items()}
    facts |= {
        key: _short(value)
        for key, value in header.items()
        if key not in ("kind", "schema", "kvtool", "model", "corpora", "done")
    }
    facts |= {f"samples.{kind}": len(done) for kind, done in header.get("done", {}).items()}
    table("what", ("", ""), facts.items())
    parts = [(kind, part) for kind, parts in _corpora(header).items() for part in parts]
    if parts:
        lines = [
            (kind, part.get("tokens", ""), part.get("seed", ""), part["hash"], _short(part.get("sources", "")))
            for kind, part in parts
        ]
        table("corpora", ("kind", "tokens", "seed", "hash", "sources"), lines)
    rows = [(name, "×".join(map(str, t["shape"])), t["dtype"], size(t["bytes"])) for name, t in shapes.items()]
    table(
        "tensors" + (f" (first {MOST} of {len(rows)})" if len(rows) > MOST else ""),
        ("name", "shape", "dtype", "size"),
        rows[:MOST],
    )
    return {"file": path, **header, "tensors": shapes, "bytes": total}


def _corpora(header: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return header.get("corpora") or header.get("provenance", {}).get("corpora", {})


def _short(value: object) -> str:
    if isinstance(value, list):
        if len(set(map(str, value))) == 1 and len(value) > 1:
            return f"{value[0]} (all {len(value)})"
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        inner = value["items"] if value.keys() == {"items"} else value  # a dictionary in a record
        return ", ".join(f"{key}={_short(item)}" for key, item in inner.items()) or "none"
    return str(value)
