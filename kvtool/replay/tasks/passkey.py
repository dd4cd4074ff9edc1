"""Passkey recall over a grid of prompt length × depth: is every token of the key generated, greedily?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.corpus.passkey import passkey
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject, batches

METRICS = ("recall", "recall_full")


@dataclass(frozen=True)
class Options:
    """lengths: prompt lengths, tokens. depths: where the key lies, 0 to 1. keys: keys per point. batch: prompts
    decoded together."""

    lengths: tuple[int, ...] = (1000, 2000)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    keys: int = 4
    batch: int = 4

    def __post_init__(self) -> None:
        at_least(1, self, "keys", "batch")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = passkey(
        subject.model, lengths=options.lengths, depths=options.depths, keys=options.keys, seed=subject.seed
    )
    hits: dict[str, dict[tuple[int, float], list[bool]]] = {side: {} for side in SIDES}
    for group in grouped(corpus.samples, options):
        caches = subject.both(prompts(group)[:, :-1])
        for side in SIDES:
            for sample, hit in zip(group, recalled(subject, caches[side], group), strict=True):
                hits[side].setdefault((sample.length, sample.depth), []).append(hit)
        progress(f"passkey {group[0].length} tokens")
    grid = [
        {
            "length": length,
            "depth": depth,
            "keys": len(found),
            **{side: _mean(hits[side][length, depth]) for side in SIDES},
        }
        for (length, depth), found in hits["full"].items()
    ]
    every = {side: [hit for found in hits[side].values() for hit in found] for side in SIDES}
    recall = {side: _mean(found) for side, found in every.items()}
    interval = {side: _interval(found) for side, found in every.items()}
    metrics = {"recall": recall["plan"], "recall_full": recall["full"]}
    detail = {"grid": grid, "interval": interval, "prompts": len(every["full"]), "corpus": corpus.provenance}
    return Result(metrics, detail)


def grouped(samples: Sequence[Sample], options: Options) -> Iterable[list[Sample]]:
    """Samples of one length, at most `batch` at a time."""
    for length in options.lengths:
        yield from batches([sample for sample in samples if sample.length == length], options.batch)


def prompts(group: Sequence[Sample]) -> torch.Tensor:
    """Samples of one length → int64 [B,T]."""
    return torch.stack([sample.tokens for sample in group])


def recalled(subject: Subject, cache: SegmentCache, group: Sequence[Sample]) -> list[bool]:
    """Is each sample's whole answer what follows greedily? `cache` has seen the prompts but for their last token."""
    answers = [sample.answer for sample in group if sample.answer is not None]
    out = subject.greedy(cache, prompts(group)[:, -1:], max(map(len, answers)))
    return [torch.equal(row[: len(answer)], answer) for row, answer in zip(out, answers, strict=True)]


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(options.lengths) * -(-len(options.depths) * options.keys // options.batch)


def _interval(hits: list[bool]) -> tuple[float, float]:
    """95 % confidence interval of the recall (Wilson's score interval)."""
    found = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _mean(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def show(result: Result):
    """Recall by prompt length and depth: (columns, rows) for the terminal."""
    lengths = sorted({point["length"] for point in result.detail["grid"]})
    depths = sorted({point["depth"] for point in result.detail["grid"]})
    cell = {(point["length"], point["depth"]): point for point in result.detail["grid"]}
    rows = [
        (f"{side}, {length} tokens", *(f"{cell[length, depth][side]:.2f}" for depth in depths))
        for length in lengths
        for side in SIDES
    ]
    for side, (low, high) in result.detail["interval"].items():
        label = f"{side}, 95 % interval over {result.detail['prompts']} prompts"
        rows.append((label, f"{low:.2f} to {high:.2f}", *("" for _ in depths[1:])))
    return ("passkey at depth", *(f"{depth:.0%}" for depth in depths)), rows
