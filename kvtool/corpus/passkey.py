"""Passkeys: digits hidden in a haystack, to be said again at the end.

`passkey` makes the evaluation grid, one raw (non-chat) prompt per length, depth and key, whose greedy
continuation is the key. `multi_passkey` makes the training prompts of DuoAttention (arXiv:2410.10819):
several named keys in one haystack, and a tail that asks for each and gives the answer, so that one forward
pass grades them all.

Keys come with the token that a word's end puts before them (a space, in most tokenizers): `answer` and each
span decode to the digits with white space around.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch

from kvtool.corpus.base import Corpus, Sample, gather, piece
from kvtool.corpus.haystack import Haystack, Part, compose
from kvtool.errors import InputError
from kvtool.model import Model

TOLD = "the secret pass key is the number"
PLACES = (
    "Lisbon", "Oslo", "Cairo", "Tokyo", "Madrid", "Dublin", "Vienna", "Athens", "Warsaw", "Lima", "Nairobi",
    "Boston", "Prague", "Berlin", "Toronto", "Sydney", "Moscow", "Geneva", "Havana", "Seoul",
)  # fmt: skip


def passkey(
    model: Model,
    *,
    lengths: Sequence[int] = (1000, 2000),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    keys: int = 4,
    digits: int = 5,
    seed: int = 0,
    haystack: str = "default",
) -> Corpus:
    """One sample per (length in tokens, depth 0..1, key); `haystack` is "default" (held-out half) or "noise".

    `evidence` holds both places where the key is told. Raises InputError for a bad grid or a too short
    length.
    """
    _check(keys=keys, digits=digits)
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    samples = []
    for length, depth in itertools.product(lengths, depths):
        for number in numbers(rng, keys, digits):
            key = piece(model, f" {number}", before="number")
            needle: list[Part] = [f"\n\nImportant: {TOLD}", key, f". Remember it: {TOLD}", key, "."]
            tail = [f"\n\nWhat is the secret pass key? Important: {TOLD}"]
            tokens, (spans, asked) = compose(model, straw, rng, length=length, inserts=[(depth, needle)], tail=tail)
            answer, evidence = torch.tensor(key), (spans[1], spans[3])
            samples.append(
                Sample(tokens, "passkey", answer, evidence, length=length, depth=depth, question=asked[0][0])
            )
    options = dict(lengths=list(lengths), depths=list(depths), keys=keys, digits=digits, haystack=haystack)
    return gather("passkey", samples, seed=seed, options=options, sources=[straw.source])


def multi_passkey(
    model: Model,
    *,
    length: int,
    passkeys: int = 10,
    seed: int = 0,
    digits: int = 5,
    index: int = 0,
    haystack: str | Haystack = "calibration",
) -> Sample:
    """Training prompt number `index` of `seed`: exactly `length` tokens, `passkeys` keys at seeded depths.

    `labels` are the answers in the tail, in the tail's order; `evidence` the keys in the haystack, in the
    same order. The keys begin with different digits (up to ten of them), so that after the first digit
    nothing is ambiguous. A loop over `index` is faster with a `Haystack` made once.
    """
    _check(passkeys=passkeys, digits=digits)
    if passkeys > len(PLACES):
        raise InputError("too many passkeys for one prompt", got=passkeys, expected=f"at most {len(PLACES)}")
    rng = random.Random(f"{seed}/{index}")
    places = rng.sample(PLACES, passkeys)
    keys = [piece(model, f" {number}", before=":") for number in numbers(rng, passkeys, digits)]
    told = [(f"The pass key of {place}:", key) for place, key in zip(places, keys, strict=True)]
    inserts: list[tuple[float, list[Part]]] = [
        (rng.uniform(0.05, 0.95), ["\n\n" + text, key, "."]) for text, key in told
    ]
    tail: list[Part] = []
    for place, (text, key) in zip(places, told, strict=True):
        tail += [f"\n\nWhat is the pass key of {place}? {text}", key, "."]
    straw = haystack if isinstance(haystack, Haystack) else Haystack(model, haystack)
    tokens, (*spans, answers) = compose(model, straw, rng, length=length, inserts=inserts, tail=tail)
    evidence = tuple(span[1] for span in spans)
    labels, asked = tuple(answers[1::3]), answers[0][0]
    return Sample(tokens, "passkey", evidence=evidence, labels=labels, length=length, question=asked)


def numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """`count` numbers of `digits` digits that begin with different digits, up to ten of them."""
    leads = rng.sample("0123456789", 10)
    return [leads[i % 10] + "".join(rng.choices("0123456789", k=digits - 1)) for i in range(count)]


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"the number of {name}", got=value, expected="1 or more")
