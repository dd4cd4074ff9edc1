"""Bytes and time of one sequence: what the cache holds, what a decode step reads, what was moved, and how long
prefill and a step take.

The sides take turns, so that a busy machine slows both. Times are medians; ratios are of medians from this run.

Under a plan that drafts, its side is speculation: it holds both caches, and a decode step is a token written, in the
mean over all of them, timed after the full cache's steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.text import text
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject
from kvtool.speculate import speculate

Made = TypeVar("Made")
DRAFTS = True
METRICS = (
    "bytes_held", "bytes_held_full", "bytes_ratio", "bytes_read", "bytes_read_full", "bytes_moved", "prefill_seconds",
    "prefill_seconds_full", "prefill_ratio", "decode_seconds", "decode_seconds_full", "decode_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """length: tokens in the cache. steps: decode steps timed a side. repeats: prefills timed a side."""

    length: int = 2000
    steps: int = 32
    repeats: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "length", "steps", "repeats")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    corpus = text(subject.model, ["default"], tokens=options.length, samples=1, seed=subject.seed)
    prompt = corpus.samples[0].tokens[None]
    prefill: dict[str, list[float]] = {side: [] for side in SIDES}
    decode: dict[str, list[float]] = {side: [] for side in SIDES}
    caches: dict[str, list[SegmentCache]] = {}
    for _ in range(options.repeats):
        for side in SIDES:
            seconds, caches[side] = _timed(partial(_filled, subject, side, prompt, options.steps))
            prefill[side].append(seconds)
            progress("prefill time")
    held = {side: sum(cache.nbytes for cache in caches[side]) for side in SIDES}
    read = {side: float(caches[side][0].read_bytes) for side in SIDES}
    token, drafts = prompt[:, -1:], subject.plan.draft
    for _ in range(options.steps):
        for side in SIDES if drafts is None else SIDES[:1]:
            decode[side].append(_timed(partial(subject.step, caches[side][0], token))[0])
        progress("decode time")
    if drafts is not None:
        full, draft, *below = caches["plan"]
        each = [cache.read_bytes for cache in caches["plan"]]
        work = partial(
            speculate, subject.model, full, draft, token, options.steps, drafts, below=below[0] if below else None
        )
        seconds, out = _timed(work)
        decode["plan"].append(seconds / options.steps)
        passes = (out.passes, *out.drafting)
        read["plan"] = sum(count * bytes for count, bytes in zip(passes, each, strict=True)) / options.steps
    median = {side: (statistics.median(prefill[side]), statistics.median(decode[side])) for side in SIDES}
    metrics = {
        "bytes_held": float(held["plan"]),
        "bytes_held_full": float(held["full"]),
        "bytes_ratio": held["plan"] / held["full"],
        "bytes_read": read["plan"],
        "bytes_read_full": read["full"],
        "bytes_moved": float(sum(cache.moved_bytes for cache in caches["plan"])),
        "prefill_seconds": median["plan"][0],
        "prefill_seconds_full": median["full"][0],
        "prefill_ratio": median["plan"][0] / median["full"][0],
        "decode_seconds": median["plan"][1],
        "decode_seconds_full": median["full"][1],
        "decode_ratio": median["plan"][1] / median["full"][1],
    }
    own = caches["plan"][0 if drafts is None else 1]
    return Result(metrics, {"length": options.length, "entries": own.entries().tolist()})


def _filled(subject: Subject, side: str, prompt: torch.Tensor, steps: int) -> list[SegmentCache]:
    """What a side holds after the prompt int64 [1,T]: one cache, or the full one, the draft's and that below it."""
    follow = prompt[:, -1:].expand(-1, steps)
    if side == "plan" and subject.plan.draft is not None:
        both = list(subject.both(prompt, follow).values())
        below = subject.below(both[0])
        return both if below is None else [*both, below]
    cache = subject.cache(side, prompt.shape[1])
    cache.tell(follow)
    subject.prefill(cache, prompt)
    return [cache]


def _timed(work: Callable[[], Made]) -> tuple[float, Made]:
    """Seconds that `work` took, and what it made."""
    start = time.perf_counter()
    made = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(SIDES) * options.repeats + options.steps
