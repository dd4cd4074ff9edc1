"""Several documents, and a question that one of them answers: what is read apart, or one document after the other.

Every document tells a fact in the same words, so that finding the right document is a part of the answer:

    passkey  "The pass key of Oslo: 48213."; the question names the place
    needle   the needles of `needle.py`, a different one in each document; the question is that of one

Each document has exactly so many tokens of haystack and fact; the fact lies anywhere in it. It knows no cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.corpus.base import piece
from kvtool.corpus.haystack import Haystack
from kvtool.corpus.needle import NEEDLES
from kvtool.corpus.passkey import PLACES, numbers
from kvtool.errors import InputError
from kvtool.model import Model

PREFIX = "Some documents follow, each on its own. After them there is a question, which one of them answers.\n"
Kind = Literal["passkey", "needle"]


@dataclass(frozen=True)
class Shelf:
    """Token ids, int64: of what stands before all documents, with the model's start tokens; of each document; of the
    question; of the expected answer. `at`: the document that has it."""

    prefix: torch.Tensor
    documents: tuple[torch.Tensor, ...]
    question: torch.Tensor
    answer: torch.Tensor
    at: int

    @property
    def asked(self) -> torch.Tensor:
        """What is fed after the documents to see every token of the answer predicted."""
        return torch.cat([self.question, self.answer[:-1]])


def shelves(
    model: Model,
    *,
    samples: int,
    documents: int,
    tokens: int,
    kind: Kind = "passkey",
    seed: int = 0,
    haystack: str = "default",
) -> list[Shelf]:
    """`samples` shelves of so many documents of `tokens` tokens each; every place of the answer comes in turn."""
    most = len(PLACES) if kind == "passkey" else len(NEEDLES)
    if samples < 1 or not 1 <= documents <= most:
        raise InputError(
            "bad shelves", got=f"{samples} of {documents} documents", expected=f"1 or more, of 1 to {most} documents"
        )
    rng, straw = random.Random(seed), Haystack(model, haystack)
    return [_shelf(model, straw, rng, at % documents, documents, tokens, kind) for at in range(samples)]


def _shelf(
    model: Model, straw: Haystack, rng: random.Random, at: int, count: int, tokens: int, kind: Kind
) -> Shelf:  # fmt: skip
    facts, question = (_keys if kind == "passkey" else _needles)(rng, at, count)
    made = [[*piece(model, "\n\n" + told), *piece(model, rest, before=told)] for told, rest in facts]
    told, rest = facts[at]
    return Shelf(
        torch.tensor([*model.start, *model.ids(PREFIX).tolist()]),
        tuple(_document(straw, rng, fact, tokens) for fact in made),
        torch.tensor(piece(model, f"\n\n{question} {told}")),
        torch.tensor(piece(model, rest, before=told)),
        at,
    )


def _keys(rng: random.Random, at: int, count: int) -> tuple[list[tuple[str, str]], str]:
    """What is told, cut where the answer begins, of each document; and the question."""
    places = rng.sample(PLACES, count)
    keys = numbers(rng, count, 5)
    facts = [(f"The pass key of {place}:", f" {key}.") for place, key in zip(places, keys, strict=True)]
    return facts, f"What is the pass key of {places[at]}?"


def _needles(rng: random.Random, at: int, count: int) -> tuple[list[tuple[str, str]], str]:
    chosen = rng.sample(NEEDLES, count)
    return [(opening, rest) for _, opening, rest in chosen], chosen[at][0]


def _document(straw: Haystack, rng: random.Random, fact: Sequence[int], tokens: int) -> torch.Tensor:
    room = tokens - len(fact)
    if room < 1:
        raise InputError("documents too short for a fact", got=f"{tokens} tokens", expected=f"{len(fact) + 1} or more")
    body = straw.body(room, rng)
    seam = body.seam(rng.uniform(0, 1))
    return torch.tensor([*body.tokens[:seam], *fact, *body.tokens[seam:]])
