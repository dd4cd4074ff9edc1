"""`kvtool inspect`: explain any file that kvtool wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvtool import files
from kvtool.commands._console import note, size, table
from kvtool.commands._outline import outline

MOST = 40  # rows of tensors shown
FEW = 4096  # numbers of a plan's array whose range is told: thresholds, budgets and scores, not bases
# told otherwise, or for programs only
APART = ("kind", "schema", "kvtool", "model", "corpora", "done", "layers", "slots")


def run(path: str) -> dict[str, Any]:
    """Returns the record that `--json` prints: the header, each tensor's shape, dtype and bytes, and of a plan's small
    arrays of floats the range."""
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
    facts |= {key: _short(value) for key, value in header.items() if key not in APART}
    facts |= {f"samples.{kind}": len(done) for kind, done in header.get("done", {}).items()}
    extents = {name: tensor["shape"] for name, tensor in shapes.items()}
    for slot, document in header.get("slots", {}).items():
        facts |= dict(outline(slot, document, extents))
    table("what", ("", ""), facts.items())
    if header["kind"] == "snapshot":
        told = header["document"]
        sizes(told["raw"], told["held"], total if path == "-" else Path(path).stat().st_size)
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
    ranges = numbers(tensors) if header["kind"] == "plan" else {}
    if ranges:
        said = [
            (name, told["least"], _place(told["least_at"]), told["mean"], told["most"], _place(told["most_at"]))
            for name, told in ranges.items()
        ]
        table("numbers, and where the extremes are (layer, head)", ("name", "least", "at", "mean", "most", "at"), said)
    return {"file": path, **header, "tensors": shapes, "numbers": ranges, "bytes": total}


def numbers(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Least, mean and most of the finite numbers of small arrays of floats, and the indices of the extremes."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() or not 1 < tensor.numel() <= FEW:
            continue
        values = tensor.double()
        finite = values.isfinite()
        if not finite.any():
            continue
        ends = {
            "least": int(values.where(finite, float("inf")).argmin()),
            "most": int(values.where(finite, float("-inf")).argmax()),
        }
        told: dict[str, Any] = {"mean": float(values[finite].mean())}
        for end, at in ends.items():
            index = [int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape)]
            told |= {end: float(values[tuple(index)]), f"{end}_at": index}
        found[name] = told
    return found


def _place(index: list[int]) -> str:
    return ".".join(map(str, index))


def sizes(raw: int, held: int, file: int | None) -> None:
    """A snapshot's bytes three times: as 16-bit keys and values, as the cache holds them, as the file has them."""
    rows = (("keys and values in 16 bits", raw), ("held by the cache", held), ("in the file", file))
    cells = [(what, size(count), f"{count / raw:.3f}×") for what, count in rows if count is not None]
    table("bytes", ("", "", "of 16 bits"), cells)


def _corpora(header: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return header.get("corpora") or header.get("provenance", {}).get("corpora", {})


def _short(value: object) -> str:
    if isinstance(value, list):
        if len(set(map(str, value))) == 1 and len(value) > 1:
            return f"{value[0]} (all {len(value)})"
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items()) or "none"
    return str(value)
