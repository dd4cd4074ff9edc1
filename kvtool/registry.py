"""A folder is a registry: one file, one entry, named as the user types it (dashes for underscores).

Names come from the file list, without importing anything; modules are imported when asked for.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

from kvtool.errors import unknown

ROOT = Path(__file__).parent


def names(folder: str) -> list[str]:
    """Entries of kvtool/<folder>: file stems with dashes, without base files (those that start with an underscore)."""
    return sorted(p.stem.replace("_", "-") for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_"))


def module(folder: str, name: str, kind: str) -> ModuleType:
    """Import one entry; raises InputError with a suggestion when there is none of that name."""
    stem = spelled(name).replace("-", "_")
    if stem.startswith("_") or not (ROOT / folder / f"{stem}.py").is_file():
        raise unknown(kind, name, names(folder))
    dotted = folder.replace("/", ".")
    return importlib.import_module(f"kvtool.{dotted}.{stem}")


def spelled(name: str) -> str:
    """A name as the user may type it → as the folder has it."""
    return name.replace("_", "-").lower()


def summary(folder: str, name: str) -> str:
    """First line of an entry's docstring, read without importing it."""
    source = (ROOT / folder / f"{name.replace('-', '_')}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
