"""Passkeys: digits hidden in a haystack, to be said again at the end.

`passkey` makes the evaluation grid, one raw (non-chat) prompt per length, depth and key, whose greedy continuation
is the key. `multi_passkey` makes the training prompts of DuoAttention (arXiv:2410.10819): several named keys in one
haystack, and a tail that asks for each and gives the answer, so that one forward pass grades them all.

Keys come with the token that a word's end puts before them (a space, in most tokenizers): `answer` and each span
decode to the digits with white space around.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from kvtool.corpus.base import Corpus, Sample, gather, piece
from kvtool.corpus.haystack import Haystack, compose
from kvtool.errors import InputError
from kvtool.model import Model

DOORS = (
    "red", "blue", "green", "yellow", "white", "black", "silver", "golden", "wooden", "stone", "iron", "glass", "old",
    "narrow", "hidden", "northern", "southern", "eastern", "western", "upper",
)  # fmt: skip


def passkey(
    model: Model, *, lengths: Sequence[int] = (1000, 2000), depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    keys: int = 4, digits: int = 5, seed: int = 0, haystack: str = "default",
) -> Corpus:  # fmt: skip
    """One sample per (length in tokens, depth 0..1, key); `haystack` is "default" (held-out half) or "noise".

    `evidence` holds both places where the key is told. Raises InputError for a bad grid or a too short length.
    """
    _check(keys=keys, digits=digits)
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    samples = []
    for length in lengths:
        for depth in depths:
            if not 0 <= depth <= 1:
                raise InputError("a depth lies outside the text", got=depth, expected="0 to 1")
            for _ in range(keys):
                key = piece(model, " " + _key(rng, digits), before="is")
                needle: list[str | list[int]] = ["\n\nThe pass key is", key, ". Remember it.", key, " is the pass key.\n"]
                prompt, (spans, _tail) = compose(
                    model, straw, rng, length=length, inserts=[(depth, needle)],
                    tail=["\n\nWhat is the pass key? The pass key is"],
                )  # fmt: skip
                samples.append(
                    Sample(
                        prompt.tokens(), "passkey", answer=torch.tensor(key), evidence=(spans[1], spans[3]),
                        length=length, depth=depth,
                    )  # fmt: skip
                )
    options = dict(lengths=list(lengths), depths=list(depths), keys=keys, digits=digits, haystack=haystack)
    return gather("passkey", samples, seed=seed, options=options, sources=[straw.source])


def multi_passkey(
    model: Model, *, length: int, passkeys: int = 10, seed: int = 0, digits: int = 5, index: int = 0,
    haystack: str = "calibration",
) -> Sample:  # fmt: skip
    """Training prompt number `index` of `seed`: exactly `length` tokens, `passkeys` named keys at 5 to 95 % depth.

    `labels` are the answers in the tail, in the tail's order; `evidence` the keys in the haystack, in the same order.
    """
    _check(keys=passkeys, digits=digits)
    if passkeys > len(DOORS):
        raise InputError("too many passkeys for one prompt", got=passkeys, expected=f"at most {len(DOORS)}")
    rng = random.Random(f"{seed}/{index}")
    doors = rng.sample(DOORS, passkeys)
    keys = [piece(model, " " + _key(rng, digits), before="is") for _ in doors]
    inserts: list[tuple[float, list[str | list[int]]]] = [
        (rng.uniform(0.05, 0.95), [f"\n\nThe pass key of the {door} door is", key, ".\n"])
        for door, key in zip(doors, keys, strict=True)
    ]
    tail: list[str | list[int]] = []
    for door, key in zip(doors, keys, strict=True):
        tail += [f"\n\nWhat is the pass key of the {door} door? The pass key of the {door} door is", key, "."]
    prompt, (*spans, ends) = compose(model, Haystack(model, haystack), rng, length=length, inserts=inserts, tail=tail)
    return Sample(
        prompt.tokens(), "passkey", evidence=tuple(span[1] for span in spans), labels=tuple(ends[1::3]), length=length
    )


def _key(rng: random.Random, digits: int) -> str:
    """A number of exactly `digits` digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _check(*, keys: int, digits: int) -> None:
    for name, value in (("keys", keys), ("digits", digits)):
        if value < 1:
            raise InputError(f"the number of {name}", got=value, expected="1 or more")
