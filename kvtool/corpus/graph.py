"""Roads between towns: the way from one town to another must be found among ways that begin alike.

A star: `branches` chains of `hops` roads begin at one town, and one of their ends is asked for. Which road to take
first is only known once its chain has been followed to the end: with b branches a guess is right once in b, and a
search must look `hops` roads ahead (the graphs by which arXiv 2412.04703 finds that transformers hardly learn to
search; theirs are of vertex numbers, trained on; ours are told in words). `branches=1` asks to follow one chain.

Each road is a sentence, and all lie scattered over a long text in any order. The answer names the towns on the way,
" Lima, Cairo, Seoul", each of which is needed to find the next one. Another star, whose towns have no roads to the
first one's, is the worked example that the tail begins with, so that a small base model sees what form the answer has.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch

from kvtool.corpus.base import Corpus, Sample, gather, piece
from kvtool.corpus.haystack import Haystack, Part, compose
from kvtool.corpus.passkey import PLACES
from kvtool.errors import InputError
from kvtool.model import Model

TOWNS = (
    *PLACES, "Paris", "London", "Rome", "Delhi", "Mumbai", "Beijing", "Chicago", "Dallas", "Denver", "Houston", "Miami",
    "Phoenix", "Seattle", "Austin", "Detroit", "Kyoto", "Osaka", "Naples", "Milan", "Venice", "Hamburg", "Munich",
    "Zurich", "Brussels", "Glasgow", "Belfast", "Cardiff", "Bristol", "Leeds", "York", "Cambridge", "Oxford", "Quebec",
    "Santiago", "Bogota", "Caracas", "Baghdad", "Tehran", "Kabul", "Hanoi", "Manila", "Perth", "Melbourne", "Auckland",
)  # fmt: skip


def graph(
    model: Model,
    *,
    lengths: Sequence[int] = (1000, 2000),
    samples: int = 4,
    hops: int = 2,
    branches: int = 2,
    seed: int = 0,
    haystack: str = "default",
) -> Corpus:
    """`samples` prompts per length (tokens, exact), each of two stars of `branches` · `hops` roads.

    `evidence` is the town that each road of the way leads to; `depth` (0..1) is where the earliest of them lies. Raises
    InputError for counts out of range and for a too short length.
    """
    towns = 2 * (1 + branches * hops)
    if min(samples, hops, branches) < 1 or towns > len(TOWNS):
        raise InputError(
            "the graph corpus", got=f"{samples} samples, {hops} hops, {branches} branches",
            expected=f"1 or more of each, and {len(TOWNS) // 2 - 1} roads or fewer",
        )  # fmt: skip
    straw = Haystack(model, haystack)
    rng = random.Random(seed)
    made = [_sample(model, straw, rng, length, hops, branches) for length in lengths for _ in range(samples)]
    options = dict(lengths=list(lengths), samples=samples, hops=hops, branches=branches, haystack=haystack)
    return gather("graph", made, seed=seed, options=options, sources=[straw.source])


def _sample(model: Model, straw: Haystack, rng: random.Random, length: int, hops: int, branches: int) -> Sample:
    """One prompt; the way that is asked for is the first chain, told first."""
    towns = rng.sample(TOWNS, 2 * (1 + branches * hops))
    chains = [chain for half in (towns[::2], towns[1::2]) for chain in _star(half, hops)]
    roads = [road for chain in chains for road in itertools.pairwise(chain)]
    inserts: list[tuple[float, list[Part]]] = [
        (rng.uniform(0.02, 0.98), [f"\n\nA road leads from {start} to", piece(model, f" {end}", before="to"), "."])
        for start, end in roads
    ]
    asked, shown = chains[0], chains[branches]
    answer, example = (piece(model, " " + ", ".join(way[1:]), before=":") for way in (asked, shown))
    ask = "\n\nOver which towns do the roads lead from {0} to {1}? From {0} to {1}:"
    tail: list[Part] = [ask.format(shown[0], shown[-1]), example, ".", ask.format(asked[0], asked[-1])]
    tokens, spans = compose(model, straw, rng, length=length, inserts=inserts, tail=tail)
    evidence = tuple(span[1] for span in spans[:hops])
    depth = min(start for start, _ in evidence) / length
    question = spans[-1][0][0]
    return Sample(tokens, "graph", torch.tensor(answer), evidence, length=length, depth=depth, question=question)


def _star(towns: Sequence[str], hops: int) -> list[list[str]]:
    """Chains of `hops` roads that begin at the first town."""
    centre, *rest = towns
    return [[centre, *rest[at : at + hops]] for at in range(0, len(rest), hops)]
