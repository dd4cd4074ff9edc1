"""Bytes and time of one sequence: what the cache holds, what a decode step reads, what was moved, and how long
prefill and a step take.

The sides take turns, so that a busy machine slows both. Times are medians; ratios are of medians from this run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kvtool.corpus.text import text
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject

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
    caches = {}
    for _ in range(options.repeats):
        for side in SIDES:
            caches[side] = subject.cache(side, options.length)
            prefill[side].append(_timed(partial(subject.prefill, caches[side], prompt)))
            progress("prefill time")
    held = {side: caches[side].nbytes for side in SIDES}
    read = {side: caches[side].read_bytes for side in SIDES}
    token = prompt[:, -1:]
    for _ in range(options.steps):
        for side in SIDES:
            decode[side].append(_timed(partial(subject.step, caches[side], token)))
        progress("decode time")
    seconds = {side: (statistics.median(prefill[side]), statistics.median(decode[side])) for side in SIDES}
    metrics = {
        "bytes_held": float(held["plan"]),
        "bytes_held_full": float(held["full"]),
        "bytes_ratio": held["plan"] / held["full"],
        "bytes_read": float(read["plan"]),
        "bytes_read_full": float(read["full"]),
        "bytes_moved": float(caches["plan"].moved_bytes),
        "prefill_seconds": seconds["plan"][0],
        "prefill_seconds_full": seconds["full"][0],
        "prefill_ratio": seconds["plan"][0] / seconds["full"][0],
        "decode_seconds": seconds["plan"][1],
        "decode_seconds_full": seconds["full"][1],
        "decode_ratio": seconds["plan"][1] / seconds["full"][1],
    }
    return Result(metrics, {"length": options.length, "entries": caches["plan"].entries().tolist()})


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(SIDES) * options.repeats + options.steps
