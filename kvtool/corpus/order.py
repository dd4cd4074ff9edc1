"""The same facts and the same question in other orders: what a reader needs who keeps little of what was read.

    plain   context, question                  what is to be kept is chosen before the question is known
    first   question, context, question        the question is known while the context is read
    twice   context, context, question         the second reading knows what the first one was about

A cache that holds everything loses nothing by order; one that lets go does, and the recall that another order gives
back is what it lost by not knowing what for (recurrent models' recall depends on order likewise: arXiv 2407.05483).

The context tells the pass keys of several places, in the same words, scattered over a long text; the question asks for
one of them. The forms of one seed have the same contexts, facts and questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from kvtool.corpus.base import Corpus, Sample, Span, gather, piece
from kvtool.corpus.haystack import Haystack, Part, compose
from kvtool.corpus.passkey import PLACES, numbers
from kvtool.errors import InputError, unknown
from kvtool.model import Model

FORMS = ("plain", "first", "twice")
MOST = 10  # places whose keys begin with different digits


def order(
    model: Model,
    *,
    form: str = "plain",
    lengths: Sequence[int] = (1000, 2000),
    samples: int = 4,
    places: int = 4,
    digits: int = 5,
    seed: int = 0,
    haystack: str = "default",
) -> Corpus:
    """`samples` prompts per length, which is that of the plain form in tokens; the others are longer by a question or a
    context. `evidence` is every place where the key stands. Raises InputError for an unknown form, for counts out of
    range and for a too short length."""
    if form not in FORMS:
        raise unknown("form of the order corpus", form, FORMS)
    if samples < 1 or digits < 1 or not 1 <= places <= MOST:
        raise InputError(
            "the order corpus", got=f"{samples} samples, {places} places, {digits} digits",
            expected=f"1 or more of each, and {MOST} places or fewer",
        )  # fmt: skip
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    made = [_sample(model, straw, rng, length, form, places, digits) for length in lengths for _ in range(samples)]
    options = dict(
        form=form, lengths=list(lengths), samples=samples, places=places, digits=digits, haystack=haystack
    )  # fmt: skip
    return gather("order", made, seed=seed, options=options, sources=[straw.source])


def _sample(
    model: Model, straw: Haystack, rng: random.Random, length: int, form: str, count: int, digits: int
) -> Sample:
    """One prompt about `count` places, of which the first is asked for."""
    places = rng.sample(PLACES, count)
    keys = [piece(model, f" {number}", before=":") for number in numbers(rng, count, digits)]
    inserts: list[tuple[float, list[Part]]] = [
        (rng.uniform(0.02, 0.98), [f"\n\nThe pass key of {place}:", key, "."])
        for place, key in zip(places, keys, strict=True)
    ]
    asks = f"\n\nWhat is the pass key of {places[0]}?"
    tail: list[Part] = [asks, piece(model, f" The pass key of {places[0]}:", before="?")]
    plain, (told, *_, asked) = compose(model, straw, rng, length=length, inserts=inserts, tail=tail)
    start, end = len(model.start), asked[0][0]
    lead, context = plain[:start], plain[start:end]
    before = {"plain": plain[:0], "first": plain[end : asked[0][1]], "twice": context}[form]
    tokens = torch.cat([lead, before, context, plain[end:]])
    copies = (0, len(context)) if form == "twice" else (len(before),)
    evidence: tuple[Span, ...] = tuple((told[1][0] + by, told[1][1] + by) for by in copies)
    depth = (told[1][0] - start) / len(context)
    return Sample(
        tokens, "order", torch.tensor(keys[0]), evidence, length=length, depth=depth, question=end + len(before)
    )
