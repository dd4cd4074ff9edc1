"""The text that needles are hidden in: sentences of the default text, or a few of noise, without end.

A haystack is a ring of tokenised sentences. `Haystack.body(n)` takes exactly n tokens from a random place;
the first sentence may be cut at its beginning, the last one ends whole, and `seams` are the positions between
sentences, so what is inserted never splits one. A ring shorter than n comes round again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtool.corpus import default
from kvtool.corpus.base import Span, piece
from kvtool.errors import InputError, unknown
from kvtool.model import Model

Part = str | list[int]  # text, or ids already made
NOISE = (
    " The rain falls on the hills.", " The river runs to the sea.", " The wind is cold today.",
    " Clouds pass over the town.", " Then the sun comes out again.",
)  # fmt: skip
NAMES = (*default.HALVES, "noise")


@dataclass(frozen=True)
class Body:
    """Tokens [T] of a stretch of haystack and the ascending positions at which something may be inserted."""

    tokens: list[int]
    seams: list[int]

    def seam(self, depth: float) -> int:
        """The last seam at or before the given share (0..1) of the body; 0 when there is none."""
        if not 0 <= depth <= 1:
            raise InputError("a depth lies outside the text", got=depth, expected="0 to 1")
        return max((seam for seam in self.seams if seam <= depth * len(self.tokens)), default=0)


class Haystack:
    """Tokenised sentences of one source: "calibration", "held-out" ("default" means held-out) or "noise"."""

    def __init__(self, model: Model, name: str = "default"):
        name = "held-out" if name == "default" else name
        if name not in NAMES:
            raise unknown("haystack", name, (*NAMES, "default"))
        self.source = "noise: five short sentences" if name == "noise" else f"{default.SOURCE}, {name} half"
        sentences = NOISE if name == "noise" else _sentences(name)
        self.sentences = [piece(model, sentence) for sentence in sentences]

    def body(self, tokens: int, rng: random.Random) -> Body:
        """Exactly `tokens` tokens, from a sentence that `rng` picks."""
        place = rng.randrange(len(self.sentences))
        ids: list[int] = []
        seams = [0]
        while len(ids) < tokens:
            ids += self.sentences[place % len(self.sentences)]
            seams.append(len(ids))
            place += 1
        surplus = len(ids) - tokens
        return Body(ids[surplus:], [seam - surplus for seam in seams if seam >= surplus])


def compose(
    model: Model,
    haystack: Haystack,
    rng: random.Random,
    *,
    length: int,
    inserts: Sequence[tuple[float, Sequence[Part]]],
    tail: Sequence[Part],
) -> tuple[torch.Tensor, list[list[Span]]]:
    """Prompt of exactly `length` tokens: haystack, `inserts` as (depth 0..1, pieces) in it, then `tail`.

    Every piece is tokenised by itself, so that spans are exact. Returns the tokens, int64 [length], and the
    spans of the pieces: a list per insert (in the order given), then one for the tail. Raises InputError when
    inserts and tail leave no room for the haystack, or a depth lies outside it.
    """
    made = [[_ids(model, part) for part in parts] for parts in (*(parts for _, parts in inserts), tail)]
    room = length - len(model.start) - sum(len(ids) for parts in made for ids in parts)
    if room < 1:
        raise InputError("the prompt is too short", got=f"{length} tokens", expected=f"{length - room + 1} or more")
    body = haystack.body(room, rng)
    places = [*(body.seam(depth) for depth, _ in inserts), room]
    spans: list[list[Span]] = [[] for _ in made]
    prompt, at = list(model.start), 0
    order = sorted(range(len(made)), key=places.__getitem__)  # stable: the tail comes last
    for index in order:
        prompt += body.tokens[at : places[index]]
        at = places[index]
        for ids in made[index]:
            spans[index].append((len(prompt), len(prompt) + len(ids)))
            prompt += ids
    return torch.tensor(prompt, dtype=torch.long), spans


def _ids(model: Model, part: Part) -> list[int]:
    return piece(model, part) if isinstance(part, str) else part


def _sentences(half: str) -> list[str]:
    """Sentences, each with the white space before it: a space, or a blank line where a paragraph starts."""
    sentences = []
    for document in default.documents(half):
        for paragraph in document.split("\n\n"):
            first, *rest = re.split(r"(?<=[.!?:]) (?=[A-Z\"])", paragraph)
            sentences += ["\n\n" + first, *(" " + sentence for sentence in rest)]
    return sentences
