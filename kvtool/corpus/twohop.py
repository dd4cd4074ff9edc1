"""Two facts that must be joined: whose pet is called what, and where the pet of that name lives.

Several owners are told in the same words, so a head that only matches the question's words finds the pet's name but
not yet its home. The answer says both, " Rex. Rex lives in Oslo": the second half can only be read after the first.
Facts are scattered over the text; one further owner is the worked example that the tail begins with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from kvtool.corpus.base import Corpus, Sample, gather, piece
from kvtool.corpus.haystack import Haystack, compose
from kvtool.errors import InputError
from kvtool.model import Model

OWNERS = ("Anna", "Peter", "Maria", "Thomas", "Julia", "Oscar", "Helen", "Victor", "Clara", "Martin")
PETS = ("Rex", "Bella", "Milo", "Luna", "Bruno", "Daisy", "Felix", "Ruby", "Jasper", "Penny")
HOMES = ("Oslo", "Lisbon", "Cairo", "Dublin", "Vienna", "Athens", "Lima", "Prague", "Geneva", "Boston")


def twohop(
    model: Model, *, lengths: Sequence[int] = (1000, 2000), samples: int = 8, distractors: int = 2, seed: int = 0,
    haystack: str = "held-out",
) -> Corpus:  # fmt: skip
    """`samples` prompts per length (tokens, exact), with `distractors` owners besides the asked one and the example.

    `evidence` is the pet's name in its owner's sentence and the home in the pet's sentence; `depth` (0..1) is where
    the deeper of the two lies, counted from the start. Raises InputError for counts that the lists do not hold.
    """
    most = len(OWNERS) - 2
    if samples < 1 or not 0 <= distractors <= most:
        raise InputError(
            "the two-hop corpus", got=f"{samples} samples with {distractors} distractors",
            expected=f"1 sample or more, 0 to {most} distractors",
        )  # fmt: skip
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    made = [_sample(model, straw, rng, length, distractors) for length in lengths for _ in range(samples)]
    options = dict(lengths=list(lengths), samples=samples, distractors=distractors, haystack=haystack)
    return gather("two-hop", made, seed=seed, options=options, sources=[straw.source])


def _sample(model: Model, straw: Haystack, rng: random.Random, length: int, distractors: int) -> Sample:
    count = distractors + 2
    owners, pets, homes = (rng.sample(names, count) for names in (OWNERS, PETS, HOMES))
    called = [piece(model, " " + pet, before="called") for pet in pets]
    living = [piece(model, " " + home, before="in") for home in homes]
    inserts = []
    for owner, pet, name, home in zip(owners, pets, called, living, strict=True):
        inserts.append((rng.uniform(0.02, 0.98), [f"\n\n{owner}'s dog is called", name, ".\n"]))
        inserts.append((rng.uniform(0.02, 0.98), [f"\n\n{pet} lives in", home, ".\n"]))
    example = [f"\n\nWhere does {owners[1]}'s dog live? {owners[1]}'s dog is called", called[1]]
    example += [f". {pets[1]} lives in", living[1], "."]
    ask = f"\n\nWhere does {owners[0]}'s dog live? {owners[0]}'s dog is called"
    prompt, (first, second, *_rest) = compose(
        model, straw, rng, length=length, inserts=inserts, tail=[*example, ask]
    )
    answer = called[0] + piece(model, f". {pets[0]} lives in", before=pets[0]) + living[0]
    return Sample(
        prompt.tokens(), "two-hop", answer=torch.tensor(answer), evidence=(first[1], second[1]), length=length,
        depth=min(first[1][0], second[1][0]) / length,
    )  # fmt: skip
