"""Passkey recall over a grid of prompt length × depth: is every token of the key generated, greedily?"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.corpus.base import Corpus
from kvtool.corpus.passkey import passkey
from kvtool.model import Model
from kvtool.options import at_least
from kvtool.replay.subject import Progress, Result, Subject
from kvtool.replay.tasks import _recall
from kvtool.replay.tasks._recall import Ask, grouped, prompts, recalled, score, tally

__all__ = ["Options", "compared", "grouped", "prompts", "recalled", "run", "score", "show", "tally", "units"]
METRICS = ("recall", "recall_full")
QUALITY, ASKED, SHORT = "recall", True, {"keys": 1}


@dataclass(frozen=True)
class Options:
    """lengths: prompt lengths, tokens. depths: where the key lies, 0 to 1. keys: keys per point. batch: prompts
    decoded together. ask: is the question known when the prompt is compressed, or asked after."""

    lengths: tuple[int, ...] = (1000, 2000)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    keys: int = 4
    batch: int = 4
    ask: Ask = "known"

    def __post_init__(self) -> None:
        at_least(1, self, "keys", "batch")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = passkey(
        subject.model, lengths=options.lengths, depths=options.depths, keys=options.keys, seed=subject.seed
    )
    return _recall.judged(subject, corpus, options, _recall.Names(*METRICS), progress)


def compared(model: Model, options: Options, length: int, seed: int) -> Corpus:
    """The prompts of a comparison, of one length."""
    return passkey(model, lengths=(length,), depths=options.depths, keys=options.keys, seed=seed)


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(options.lengths) * len(options.depths) * options.keys


def show(result: Result):
    """Recall by prompt length and depth: (columns, rows) for the terminal."""
    return _recall.show(result, "passkey")
