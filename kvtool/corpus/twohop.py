"""Two facts that must be joined: where somebody lives, and the pass key of that place.

Several people and places are told of in the same words, so the words of the question alone lead to the place
but not to its key. The answer says both, " Oslo. The pass key that opens Oslo: 4821": its end can only be
read after its beginning. The facts lie scattered over the text in any order. One further person is the worked
example that the tail begins with, so that a small base model sees what form the answer has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from kvtool.corpus.base import Corpus, Sample, gather, piece
from kvtool.corpus.haystack import Haystack, Part, compose
from kvtool.corpus.passkey import PLACES, numbers
from kvtool.errors import InputError
from kvtool.model import Model

PEOPLE = ("Anna", "Peter", "Maria", "Thomas", "Julia", "Oscar", "Helen", "Victor", "Clara", "Martin")
MOST = len(PEOPLE) - 2


def twohop(
    model: Model,
    *,
    lengths: Sequence[int] = (1000, 2000),
    samples: int = 4,
    distractors: int = 1,
    digits: int = 4,
    seed: int = 0,
    haystack: str = "default",
) -> Corpus:
    """`samples` prompts per length (tokens, exact); `distractors` people besides the two of the tail.

    `evidence` is the place in its person's sentence and the key in the place's sentence; `depth` (0..1) is
    where the earlier of the two lies. Raises InputError for counts out of range and for a too short length.
    """
    if samples < 1 or digits < 1 or not 0 <= distractors <= MOST:
        raise InputError(
            "the two-hop corpus",
            got=f"{samples} samples, {digits} digits, {distractors} distractors",
            expected=f"1 sample and 1 digit or more, 0 to {MOST} distractors",
        )
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    made = [_sample(model, straw, rng, length, distractors + 2, digits) for length in lengths for _ in range(samples)]
    options = dict(lengths=list(lengths), samples=samples, distractors=distractors, digits=digits, haystack=haystack)
    return gather("two-hop", made, seed=seed, options=options, sources=[straw.source])


def _sample(model: Model, straw: Haystack, rng: random.Random, length: int, count: int, digits: int) -> Sample:
    """One prompt about `count` people: the first is asked for, the second is the worked example."""
    people, places = rng.sample(PEOPLE, count), rng.sample(PLACES, count)
    homes = [piece(model, f" {place}", before="in") for place in places]
    keys = [piece(model, f" {number}", before=":") for number in numbers(rng, count, digits)]
    inserts: list[tuple[float, list[Part]]] = []
    for person, place, home, key in zip(people, places, homes, keys, strict=True):
        inserts.append((rng.uniform(0.02, 0.98), [f"\n\n{person} lives in", home, "."]))
        inserts.append((rng.uniform(0.02, 0.98), [f"\n\nThe pass key that opens {place}:", key, "."]))
    ask = "\n\nWhat is the pass key of the place where {0} lives? {0} lives in"
    join = [piece(model, f". The pass key that opens {place}:", before=place) for place in places]
    tail: list[Part] = [ask.format(people[1]), homes[1], join[1], keys[1], ".", ask.format(people[0])]
    tokens, (first, second, *_, asked) = compose(model, straw, rng, length=length, inserts=inserts, tail=tail)
    answer, evidence = torch.tensor(homes[0] + join[0] + keys[0]), (first[1], second[1])
    depth = min(first[1][0], second[1][0]) / length
    return Sample(tokens, "two-hop", answer, evidence, length=length, depth=depth, question=asked[0][0])
