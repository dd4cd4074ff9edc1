"""The text that needles are hidden in: sentences of the default text or a few sentences of noise, without end.

A haystack is a ring of tokenised sentences. `Haystack.body(n)` takes exactly n tokens from a random place; the first
sentence may be cut at its beginning, the last one ends whole, and `seams` are the positions between sentences, so
what is inserted never splits one. A ring shorter than n comes round again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvtool.corpus import default
from kvtool.corpus.base import Prompt, Span, piece
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
    model: Model, haystack: Haystack, rng: random.Random, *, length: int,
    inserts: Sequence[tuple[float, Sequence[Part]]], tail: Sequence[Part],
) -> tuple[Prompt, list[list[Span]]]:  # fmt: skip
    """Prompt of exactly `length` tokens: haystack, `inserts` as (depth 0..1, pieces) in it, then `tail`.

    Returns the prompt, and per piece its span: a list per insert (in the order given), then one for the tail.
    Raises InputError when inserts and tail leave no room for the haystack.
    """
    made = [(depth, [_ids(model, part) for part in parts]) for depth, parts in inserts]
    end = [_ids(model, part) for part in tail]
    prompt = Prompt(model)
    room = length - len(prompt) - sum(len(i) for _, parts in made for i in parts) - sum(len(i) for i in end)
    if room < 1:
        raise InputError("the prompt is too short", got=f"{length} tokens", expected=f"more than {length - room}")
    body = haystack.body(room, rng)
    spans: list[list[Span]] = [[] for _ in made]
    at = 0
    for index in sorted(range(len(made)), key=lambda index: made[index][0]):
        seam = body.seam(made[index][0])
        prompt.add(body.tokens[at:seam])
        at = seam
        spans[index] = [prompt.add(ids) for ids in made[index][1]]
    prompt.add(body.tokens[at:])
    return prompt, [*spans, [prompt.add(ids) for ids in end]]


def _ids(model: Model, part: Part) -> list[int]:
    return piece(model, part) if isinstance(part, str) else part


def _sentences(half: str) -> list[str]:
    """Sentences with the white space that comes before each: a space, or a blank line at a paragraph's start."""
    sentences = []
    for document in default.documents(half):
        for paragraph in document.split("\n\n"):
            first, *rest = re.split(r"(?<=[.!?:]) (?=[A-Z\"])", paragraph)
            sentences += ["\n\n" + first, *(" " + sentence for sentence in rest)]
    return sentences
