"""Reading documents: a text file, JSON lines, a folder of them, stdin, or the default text.

A text file is one document, and so is the field of each line of a .jsonl file. It knows nothing of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvtool.corpus import default
from kvtool.errors import InputError

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")


def documents(source: str, *, field: str = "text", half: str | None = None) -> list[str]:
    """The documents of one source, those of white space left out; `half` is for the default text.

    Raises InputError when the source is missing, empty, not UTF-8, not JSON lines, or lacks the field.
    """
    if source == "default":
        return default.documents(half)
    if source == "-":
        found = _stdin(field)
    elif Path(source).is_dir():
        paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise InputError("a folder without text", got=source, expected="files named " + ", ".join(SUFFIXES))
        found = [document for path in paths for document in _file(path, field)]
    else:
        found = _file(Path(source), field)
    if not found:
        raise InputError("an empty source", got=source, expected="text")
    return found


def _file(path: Path, field: str) -> list[str]:
    try:
        payload = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError("no such text", got=path, expected="a file, a folder, - or default") from error
    except OSError as error:
        raise InputError(f"cannot read {path}", got=error.strerror) from error
    content = _decoded(payload, str(path))
    return _lines(content, field, str(path)) if path.suffix.lower() == ".jsonl" else _whole(content)


def _stdin(field: str) -> list[str]:
    content = _decoded(sys.stdin.buffer.read(), "stdin")
    return _lines(content, field, "stdin") if _is_jsonl(content) else _whole(content)


def _whole(content: str) -> list[str]:
    return [content] if content.strip() else []


def _decoded(payload: bytes, source: str) -> str:
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not text",
            got=f"byte {payload[error.start]:#04x} at {error.start}",
            expected="UTF-8",
            remedy=f"convert it first, e.g. iconv -f latin1 -t utf-8 {source}",
        ) from error


def _is_jsonl(content: str) -> bool:
    """Is every line that is not blank a JSON object?"""
    lines = [line for line in content.split("\n") if line.strip()]
    try:
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines)
    except json.JSONDecodeError:
        return False


def _lines(content: str, field: str, source: str) -> list[str]:
    """The `field` of every line that is not blank; documents of white space are left out."""
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {source} is not JSON", got=error.msg) from error
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(
                f"line {number} of {source} has no text under {field!r}",
                got=got,
                expected="an object with that field",
                remedy="name the field of the text",
            )
        documents += _whole(entry[field])
    return documents
