"""Plain text: files, folders, JSON lines, stdin or the default text, as prompts of a wanted length.

Documents are drawn in a seeded order and tokenised until there is several times what was asked for, so a
large source is never tokenised whole. "pack" joins them by the end-of-text token (a blank line where there is
none) and cuts windows of exactly the wanted length, of which a seeded choice is taken; "documents" starts
every sample at the beginning of a document.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvtool.corpus import default
from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.corpus.sources import documents as read
from kvtool.errors import InputError
from kvtool.model import Model

SHORTEST = 16  # tokens that a document must have to become a sample
SURPLUS = 4  # windows to choose from, in multiples of what is asked for


def text(
    model: Model,
    sources: Sequence[str | Path] | str | Path = ("default",),
    *,
    field: str = "text",
    tokens: int = 1024,
    samples: int = 8,
    cut: str = "pack",
    seed: int = 0,
    half: str | None = None,
) -> Corpus:
    """`samples` prompts of `tokens` tokens each (with cut="documents": at most), start tokens included.

    A source is a text file, a .jsonl file (`field` of each line is a document), a folder (its .txt, .md, .rst
    and .jsonl files at any depth), "-" for stdin (text, or JSON lines where every line is an object), or
    "default" (`half` of it: "calibration", "held-out", or None for both). Raises InputError for sources that
    cannot be read and when there is less text than asked for.
    """
    if cut not in ("pack", "documents"):
        raise InputError("how to cut the text", got=repr(cut), expected="pack or documents")
    room = tokens - len(model.start)
    if room < SHORTEST or samples < 1:
        raise InputError(
            "the text corpus",
            got=f"{samples} samples of {tokens} tokens",
            expected=f"1 or more samples of {SHORTEST + len(model.start)} or more tokens",
        )
    names = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    if half is not None and "default" not in names:
        raise InputError("a half was chosen, but only the default text has halves", got=f"half={half}")
    documents = [document for name in names for document in read(name, field=field, half=half)]
    rng = random.Random(seed)
    rng.shuffle(documents)
    made = _packed(model, documents, room, samples, rng) if cut == "pack" else _heads(model, documents, room, samples)
    if len(made) < samples:
        raise InputError(
            f"too little text in {', '.join(names)}",
            got=f"{len(made)} samples of {tokens} tokens",
            expected=samples,
            remedy="ask for fewer or shorter samples, or name more sources",
        )
    options: dict[str, Any] = dict(tokens=tokens, samples=samples, cut=cut, field=field, half=half)
    return gather(
        "text",
        [_sample(model, ids, tokens) for ids in made],
        seed=seed,
        options=options,
        sources=[default.SOURCE if name == "default" else name for name in names],
    )


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
