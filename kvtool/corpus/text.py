"""Plain text: files, folders, JSON lines, stdin, or the default text, as prompts of a wanted number of tokens.

Documents are drawn in a seeded order and tokenised until there is several times what was asked for, so a large
source is never tokenised whole. "pack" joins them by the end-of-text token (a blank line where there is none) and
cuts windows of exactly the wanted length, of which a seeded choice is taken; "documents" starts every sample at the
beginning of a document.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvtool.corpus import default
from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.errors import InputError
from kvtool.model import Model

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
SHORTEST = 16  # tokens that a document must have to become a sample
SURPLUS = 4  # windows to choose from, in multiples of what is asked for


def text(
    model: Model, sources: Sequence[str | Path] | str | Path = ("default",), *, field: str = "text", tokens: int = 1024,
    samples: int = 8, cut: str = "pack", seed: int = 0, half: str | None = None,
) -> Corpus:  # fmt: skip
    """`samples` prompts of `tokens` tokens each, start tokens included; with cut="documents" at most that many.

    A source is a text file, a .jsonl file (`field` of each line is a document), a folder (its .txt, .md, .rst and
    .jsonl files at any depth), "-" for stdin (text, or JSON lines where every line is an object), or "default"
    (`half` of it: "calibration", "held-out", or None for both). Raises InputError for sources that cannot be read
    and when there is less text than asked for.
    """
    if cut not in ("pack", "documents"):
        raise InputError("how to cut the text", got=repr(cut), expected="pack or documents")
    room = tokens - len(model.start)
    if room < SHORTEST or samples < 1:
        raise InputError(
            "the text corpus", got=f"{samples} samples of {tokens} tokens",
            expected=f"1 or more samples of {SHORTEST + len(model.start)} or more tokens",
        )  # fmt: skip
    sources = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    if half is not None and "default" not in sources:
        raise InputError("a half was chosen, but only the default text has halves", got=f"half={half}")
    documents = [document for source in sources for document in _documents(source, field, half)]
    rng = random.Random(seed)
    rng.shuffle(documents)
    made = _packed(model, documents, room, samples, rng) if cut == "pack" else _heads(model, documents, room, samples)
    if len(made) < samples:
        raise InputError(
            f"too little text in {', '.join(sources)}", got=f"{len(made)} samples of {tokens} tokens",
            expected=samples, remedy="ask for fewer or shorter samples, or name more sources",
        )  # fmt: skip
    options: dict[str, Any] = dict(tokens=tokens, samples=samples, cut=cut, field=field, half=half)
    return gather(
        "text", [_sample(model, ids, tokens) for ids in made], seed=seed, options=options,
        sources=[default.SOURCE if source == "default" else source for source in sources],
    )  # fmt: skip


def _sample(model: Model, ids: list[int], tokens: int) -> Sample:
    return Sample(torch.tensor(model.start + ids, dtype=torch.long), "text", length=tokens)


def _packed(model: Model, documents: list[str], room: int, samples: int, rng: random.Random) -> list[list[int]]:
    """Up to `samples` windows of exactly `room` tokens, chosen without replacement from those cut."""
    end = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    seam = model.ids("\n\n").tolist() if end is None else [end]
    stream: list[int] = []
    for document in documents:
        stream += (seam if stream else []) + model.ids(document).tolist()
        if len(stream) >= SURPLUS * samples * room:
            break
    count = len(stream) // room
    chosen = rng.sample(range(count), min(samples, count))
    return [stream[window * room : (window + 1) * room] for window in chosen]


def _heads(model: Model, documents: list[str], room: int, samples: int) -> list[list[int]]:
    """The first `room` tokens of up to `samples` documents, those too short left out."""
    heads: list[list[int]] = []
    for document in documents:
        ids = model.ids(document)[:room].tolist()
        if len(ids) >= SHORTEST:
            heads.append(ids)
        if len(heads) == samples:
            break
    return heads


def _documents(source: str, field: str, half: str | None) -> list[str]:
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
            f"{source} is not text", got=f"byte {payload[error.start]:#04x} at {error.start}", expected="UTF-8",
            remedy=f"convert it first, e.g. iconv -f latin1 -t utf-8 {source}",
        ) from error  # fmt: skip


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
                f"line {number} of {source} has no text under {field!r}", got=got,
                expected="an object with that field", remedy="name the field of the text",
            )  # fmt: skip
        documents += _whole(entry[field])
    return documents
