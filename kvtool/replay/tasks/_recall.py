"""What the recall tasks share: a prompt counts if every token of its answer is generated, greedily.

ask "known": the question is part of the prompt that is compressed. ask "after": the context before it is compressed
first, and the question is decoded over what is left, so that no score has seen it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from scipy.stats import binomtest

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Corpus, Sample
from kvtool.replay.forced import forced
from kvtool.replay.subject import SIDES, Progress, Result, Subject, batches

Ask = Literal["known", "after"]


class Options(Protocol):
    """What the options of every recall task hold."""

    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def batch(self) -> int: ...
    @property
    def ask(self) -> Ask: ...


@dataclass(frozen=True)
class Names:
    """What a task calls its metrics, the plan's and the full cache's; and whether its prompts lie on a grid of
    depths."""

    plan: str
    full: str
    depths: bool = True


def judged(subject: Subject, corpus: Corpus, options: Options, names: Names, progress: Progress) -> Result:
    """Both sides' shares of answers. `progress` is called once a prompt."""
    hits: dict[str, dict[tuple[int, float], list[bool]]] = {side: {} for side in SIDES}
    for group in grouped(corpus.samples, options, foretold=subject.plan.foretold):
        tokens = prompts(group)
        end = tokens.shape[1] - 1 if options.ask == "known" else split(group[0])
        caches = subject.both(tokens[:, :end], torch.cat([tokens[:, end:], answers(group)[:, :-1]], dim=1))
        for side in SIDES:
            if end < tokens.shape[1] - 1:
                forced(subject.model, caches[side], tokens[:, end:-1], question=tokens.shape[1] - 1 - end)
            for sample, hit in zip(group, recalled(subject, caches[side], group), strict=True):
                hits[side].setdefault((sample.length, sample.depth if names.depths else 0.0), []).append(hit)
        for sample in group:
            progress(f"{sample.kind} {sample.length} tokens")
    grid = [
        {"length": length, **({"depth": depth} if names.depths else {}), "keys": len(found),
         **{side: _mean(hits[side][length, depth]) for side in SIDES}}
        for (length, depth), found in hits["full"].items()
    ]  # fmt: skip
    every = {side: [hit for found in hits[side].values() for hit in found] for side in SIDES}
    metrics = {names.plan: _mean(every["plan"]), names.full: _mean(every["full"])}
    intervals = {side: interval(found) for side, found in every.items()}
    detail = {"ask": options.ask, "grid": grid, "interval": intervals, "prompts": len(every["full"])}
    return Result(metrics, {**detail, "corpus": corpus.provenance})


def split(sample: Sample) -> int:
    """Where the question begins."""
    assert sample.question is not None
    return sample.question


def grouped(samples: Sequence[Sample], options: Options, *, foretold: bool = False) -> Iterable[list[Sample]]:
    """Samples of one length, at most `batch` at a time, whose tokens are as many; of one length of question, if that is
    asked after, and of one length of answer, if that is foretold."""
    for length in options.lengths:
        alike: dict[tuple[int, int | None, int], list[Sample]] = {}
        for sample in samples:
            if sample.length == length:
                asked = sample.question if options.ask == "after" else None
                told = len(_answer(sample)) if foretold else 0
                alike.setdefault((len(sample.tokens), asked, told), []).append(sample)
        for group in alike.values():
            yield from batches(group, options.batch)


def prompts(group: Sequence[Sample]) -> torch.Tensor:
    """Samples of one length → int64 [B,T]."""
    return torch.stack([sample.tokens for sample in group])


def answers(group: Sequence[Sample]) -> torch.Tensor:
    """Answers → int64 [B,A], as long as the shortest."""
    shortest = min(len(_answer(sample)) for sample in group)
    return torch.stack([_answer(sample)[:shortest] for sample in group])


def _answer(sample: Sample) -> torch.Tensor:
    assert sample.answer is not None
    return sample.answer


def recalled(subject: Subject, cache: SegmentCache, group: Sequence[Sample]) -> list[bool]:
    """Is each sample's whole answer what follows greedily? `cache` has seen the prompts but for their last token."""
    wanted = [_answer(sample) for sample in group]
    out = subject.greedy(cache, prompts(group)[:, -1:], max(map(len, wanted)))
    return [torch.equal(row[: len(answer)], answer) for row, answer in zip(out, wanted, strict=True)]


def interval(hits: Sequence[bool]) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval)."""
    found = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def score(full: torch.Tensor, plan: torch.Tensor, answer: torch.Tensor) -> dict[str, float]:
    """Logits [A,V] of both, forced along answer [A]: does greedy decoding under the plan write it?"""
    return {"hit": float(torch.equal(plan.argmax(-1), answer))}


def tally(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The share of prompts that were answered."""
    hits = [found["hit"] > 0 for found in scores]
    return {"recall": _mean(hits), "interval": interval(hits), "prompts": len(hits)}


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def show(result: Result, what: str):
    """Shares by prompt length and, on a grid, by depth: (columns, rows) for the terminal."""
    grid = result.detail["grid"]
    lengths = sorted({point["length"] for point in grid})
    depths = sorted({point.get("depth", 0.0) for point in grid})
    cell = {(point["length"], point.get("depth", 0.0)): point for point in grid}
    rows = [
        (f"{side}, {length} tokens", *(f"{cell[length, depth][side]:.2f}" for depth in depths))
        for length in lengths
        for side in SIDES
    ]
    for side, (low, high) in result.detail["interval"].items():
        count = result.detail["prompts"]
        label = f"{side}, 95 % interval over {count} prompt{'s' if count > 1 else ''}"
        rows.append((label, f"{low:.2f} to {high:.2f}", *("" for _ in depths[1:])))
    if "depth" not in grid[0]:
        return (what, ""), rows
    return (f"{what} at depth", *(f"{depth:.0%}" for depth in depths)), rows
