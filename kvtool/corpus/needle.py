"""Needles in a haystack: a made-up fact in a long text, and at the end its question and its first words.

After the retrieval-head probe (Wu et al., arXiv:2404.15574): a model that finds the needle copies the rest of
it, so `answer` is token for token what stands at `evidence`, and the prompt ends as the text before it does.
A head that looks at the token being copied is a retrieval head.

Unlike the original, the haystack is Python's help text, the needles are ours, and the needle's place is
exact.
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

# question, first words (told and asked), the rest (told and expected)
NEEDLES = (
    ("What did the clockmaker of Varnholm keep in his cellar?",
     "The clockmaker of Varnholm kept in his cellar", " seven brass owls and a barrel of plums."),
    ("Where can one best watch the lanterns of Orrin Bay?",
     "The best place to watch the lanterns of Orrin Bay is", " the flat roof behind an old salt market."),
    ("What does the ferry to Tessaly carry on Mondays?",
     "On Mondays the ferry to Tessaly carries", " a hundred letters, two goats and wet flour."),
    ("What is the secret of Aunt Maribel's soup?",
     "The secret of Aunt Maribel's soup is", " a burnt onion with two spoons of cider."),
    ("Who won the stone-skipping contest of 1894?",
     "The stone-skipping contest of 1894 was won by", " a left-handed baker called Odile Frank."),
    ("What must every visitor of the Glass Library bring?",
     "Every visitor of the Glass Library must bring", " a pair of felt slippers and one pencil."),
    ("Why is the bridge at Kolm painted orange?",
     "The bridge at Kolm is painted orange because", " the town once bought too much boat paint."),
    ("Who guards the orchard on Pell Hill?",
     "The orchard on Pell Hill is guarded by", " three grey geese and a deaf sheepdog."),
)  # fmt: skip


def needle(
    model: Model,
    *,
    lengths: Sequence[int] = (1000, 2000),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    samples: int = 2,
    seed: int = 0,
    haystack: str = "calibration",
) -> Corpus:
    """`samples` prompts per (length in tokens, depth 0..1), each of exactly that length, all needles in
    turn.
    """
    if samples < 1:
        raise InputError("samples of the needle corpus", got=samples, expected="1 or more")
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    order = rng.sample(NEEDLES, len(NEEDLES))
    made: list[Sample] = []
    for length, depth, _ in itertools.product(lengths, depths, range(samples)):
        question, opening, rest = order[len(made) % len(order)]
        ids = piece(model, rest, before=opening)
        planted: list[Part] = [f"\n\n{opening}", ids]
        inserts, tail = [(depth, planted)], [f"\n\n{question} {opening}"]
        tokens, (spans, asked) = compose(model, straw, rng, length=length, inserts=inserts, tail=tail)
        answer = torch.tensor(ids)
        made.append(Sample(tokens, "needle", answer, (spans[1],), length=length, depth=depth, question=asked[0][0]))
    options = dict(lengths=list(lengths), depths=list(depths), samples=samples, haystack=haystack)
    return gather("needle", made, seed=seed, options=options, sources=[straw.source])
