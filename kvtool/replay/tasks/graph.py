"""Search in a graph by prompt length: is the way between two towns found among ways that begin alike, every town of it
generated, greedily?

What is needed is known step by step, and the first step only once the whole way is found: nothing that a score of the
question's own words can keep alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.corpus.base import Corpus
from kvtool.corpus.graph import graph
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.replay.subject import Progress, Result, Subject
from kvtool.replay.tasks import _recall
from kvtool.replay.tasks._recall import Ask, score, tally

__all__ = ["Options", "compared", "run", "score", "show", "tally", "units"]
METRICS = ("graph", "graph_full")
QUALITY, ASKED, SHORT = "recall", True, {"samples": 3}


@dataclass(frozen=True)
class Options:
    """lengths: prompt lengths, tokens. samples: prompts per length. hops: roads of the way. branches: ways that begin
    where it begins, itself included; 1 leaves nothing to search. batch: prompts decoded together. ask: is the question
    known when the prompt is compressed, or asked after."""

    lengths: tuple[int, ...] = (1000, 2000)
    samples: int = 8
    hops: int = 2
    branches: int = 2
    batch: int = 4
    ask: Ask = "known"

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "hops", "branches", "batch")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = graph(
        subject.model, lengths=options.lengths, samples=options.samples, hops=options.hops, branches=options.branches,
        seed=subject.seed,
    )  # fmt: skip
    return _recall.judged(subject, corpus, options, _recall.Names(*METRICS, depths=False), progress)


def compared(model: Model, options: Options, length: int, seed: int) -> Corpus:
    """The prompts of a comparison, of one length."""
    return graph(
        model, lengths=(length,), samples=options.samples, hops=options.hops, branches=options.branches, seed=seed
    )


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(options.lengths) * options.samples


def show(result: Result):
    """Accuracy by prompt length: (columns, rows) for the terminal."""
    return _recall.show(result, "graph")
