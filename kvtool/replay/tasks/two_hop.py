"""Two-hop accuracy by prompt length: are two facts that lie apart joined, every token of it generated, greedily?

The answer names the place where somebody lives and then that place's key, so that what the second half needs is only
known once the first half is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.corpus.base import Corpus
from kvtool.corpus.twohop import twohop
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.replay.subject import Progress, Result, Subject
from kvtool.replay.tasks import _recall
from kvtool.replay.tasks._recall import Ask, score, tally

__all__ = ["Options", "compared", "run", "score", "show", "tally", "units"]
METRICS = ("two_hop", "two_hop_full")
QUALITY, ASKED, SHORT = "recall", True, {"samples": 3}


@dataclass(frozen=True)
class Options:
    """lengths: prompt lengths, tokens. samples: prompts per length. distractors: people told of besides the one asked
    for and the worked example. batch: prompts decoded together. ask: is the question known when the prompt is
    compressed, or asked after."""

    lengths: tuple[int, ...] = (1000, 2000)
    samples: int = 8
    distractors: int = 1
    batch: int = 4
    ask: Ask = "known"

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "batch")
        at_least(0, self, "distractors")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = twohop(
        subject.model, lengths=options.lengths, samples=options.samples, distractors=options.distractors,
        seed=subject.seed,
    )  # fmt: skip
    return _recall.judged(subject, corpus, options, _recall.Names(*METRICS, depths=False), progress)


def compared(model: Model, options: Options, length: int, seed: int) -> Corpus:
    """The prompts of a comparison, of one length."""
    return twohop(model, lengths=(length,), samples=options.samples, distractors=options.distractors, seed=seed)


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(options.lengths) * options.samples


def show(result: Result):
    """Accuracy by prompt length: (columns, rows) for the terminal."""
    return _recall.show(result, "two-hop")
