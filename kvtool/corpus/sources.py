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


def lines(source: str, *, field: str) -> list[str]:
    """The lines of a text file or of stdin, or the field of each line of JSON lines; those of white space left out."""
    text = content(source)
    rows = Path(source).suffix.lower() == ".jsonl" or _is_jsonl(text)
    found = _lines(text, field, source) if rows else [line for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError("an empty source", got=source, expected="text")
    return found


def content(source: str) -> str:
    """The text of a file, or of stdin; raises InputError when it is missing or not UTF-8."""
    if source == "-":
        return _decoded(sys.stdin.buffer.read(), "stdin")
    try:
        payload = Path(source).read_bytes()
    except FileNotFoundError as error:
        raise InputError("no such text", got=source, expected="a file, a folder, - or default") from error
    except OSError as error:
        raise InputError(f"cannot read {source}", got=error.strerror) from error
    return _decoded(payload, source)


def _file(path: Path, field: str) -> list[str]:
    text = content(str(path))
    return _lines(text, field, str(path)) if path.suffix.lower() == ".jsonl" else _whole(text)


def _stdin(field: str) -> list[str]:
    text = content("-")
    return _lines(text, field, "stdin") if _is_jsonl(text) else _whole(text)


def _whole(text: str) -> list[str]:
    return [text] if text.strip() else []


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


def _is_jsonl(text: str) -> bool:
    """Is every line that is not blank a JSON object?"""
    found = [line for line in text.split("\n") if line.strip()]
    try:
        return bool(found) and all(isinstance(json.loads(line), dict) for line in found)
    except json.JSONDecodeError:
        return False


def _lines(text: str, field: str, source: str) -> list[str]:
    """The `field` of every line that is not blank; documents of white space are left out."""
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
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
