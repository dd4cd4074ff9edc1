"""Needle recall over a grid of prompt length × depth: is a made-up sentence said again, every token of it, greedily?

The prompt ends with the sentence's first words, so that its rest is to be copied. The haystack is the half of the
default text that no calibration reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.corpus.base import Corpus
from kvtool.corpus.needle import needle
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.replay.subject import Progress, Result, Subject
from kvtool.replay.tasks import _recall
from kvtool.replay.tasks._recall import Ask, score, tally

__all__ = ["Options", "compared", "run", "score", "show", "tally", "units"]
METRICS = ("needle_recall", "needle_recall_full")
QUALITY, ASKED, SHORT = "recall", True, {"samples": 1}


@dataclass(frozen=True)
class Options:
    """lengths: prompt lengths, tokens. depths: where the needle lies, 0 to 1. samples: needles per point. batch:
    prompts decoded together. ask: is the question known when the prompt is compressed, or asked after."""

    lengths: tuple[int, ...] = (1000, 2000)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: int = 2
    batch: int = 4
    ask: Ask = "known"

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "batch")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = needle(
        subject.model, lengths=options.lengths, depths=options.depths, samples=options.samples, seed=subject.seed,
        haystack="default",
    )  # fmt: skip
    return _recall.judged(subject, corpus, options, _recall.Names(*METRICS), progress)


def compared(model: Model, options: Options, length: int, seed: int) -> Corpus:
    """The prompts of a comparison, of one length."""
    return needle(
        model, lengths=(length,), depths=options.depths, samples=options.samples, seed=seed, haystack="default"
    )


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(options.lengths) * len(options.depths) * options.samples


def show(result: Result):
    """Recall by prompt length and depth: (columns, rows) for the terminal."""
    return _recall.show(result, "needle")
