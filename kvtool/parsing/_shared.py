"""What commands share: options of the same meaning, and how a record is printed."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer

from kvtool.errors import InputError

Output = Annotated[str | None, typer.Option("-o", "--output", help="File to write; - for stdout.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON record on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="An option; may be repeated.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, or smollm2 (demo model).")]


def emit(record: dict[str, Any], as_json: bool) -> None:
    """Print what was written: its path, or the whole record."""
    if as_json:
        print(document(record))
    elif record["output"] != "-":
        print(record["output"])


def one_document(output: str | None, as_json: bool) -> None:
    if as_json and output == "-":
        raise InputError(
            "stdout cannot carry the file and its record", got="-o - and --json", remedy="drop one of them"
        )


def document(record: dict[str, Any], indent: int | None = None) -> str:
    """One JSON document. NaN and infinities become null: JSON has no word for them."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=indent)
