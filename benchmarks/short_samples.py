"""A profile of many short samples, which share forward passes, against one pass for each: seconds, which take turns,
and whether the traces are the same.

    python benchmarks/short_samples.py [--samples 16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from _harness import table

from kvtool import profile as profiling
from kvtool.corpus.base import Corpus
from kvtool.corpus.text import text
from kvtool.model import Model, load
from kvtool.profile import default_statistics, profile
from kvtool.trace import Trace, statistic

LENGTHS = (32, 128)
TOLERANCE = 1e-4
FEW = ("channels",)
ROOM = profiling.ROW


def taken(model: Model, names: list[str], corpus: Corpus, room: int) -> tuple[Trace, float]:
    """The trace, and the seconds it took."""
    trace = Trace(model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in names})
    profiling.ROW = room
    start = time.perf_counter()
    profile(model, trace, {"text": corpus})
    return trace, time.perf_counter() - start


def apart(one: Trace, other: Trace) -> float:
    """The largest difference of any sum, relative to the largest number of its accumulator."""
    found = 0.0
    for name in one.statistics:
        for key, rule in one[name].rules.items():
            mine, theirs = one[name].state[key].double(), other[name].state[key].double()
            if rule == "sum" and mine.dtype.is_floating_point:
                size = float(theirs.abs().max().clamp_min(1e-12)) if theirs.numel() else 1.0
                found = max(found, float((mine - theirs).abs().max()) / size if theirs.numel() else 0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model, rows = load("smollm2"), []
    usual = [name for name in default_statistics() if statistic(name).corpus == "text"]
    for length in LENGTHS:
        corpus = text(model, ["default"], tokens=length, samples=asked.samples)
        for title, names in (("all usual ones", usual), (", ".join(FEW), list(FEW))):
            made: dict[int, Trace] = {}
            seconds: dict[int, list[float]] = {1: [], ROOM: []}
            for _ in range(asked.rounds):
                for room, each in seconds.items():
                    made[room], time_taken = taken(model, names, corpus, room)
                    each.append(time_taken)
            far = apart(made[ROOM], made[1])
            if far > TOLERANCE:
                sys.exit(f"parity: sums of {title} differ by {far:.1e} of the largest")
            alone, packed = (statistics.median(seconds[room]) for room in (1, ROOM))
            rows.append((f"{asked.samples} × {length}", title, alone, packed, f"{packed / alone:.2f}×", f"{far:.0e}"))
    columns = ("samples × tokens", "statistics", "a pass each, s", "packed, s", "ratio", "largest difference")
    table(f"Short samples in rows of up to {ROOM} tokens, {asked.rounds} rounds", columns, rows)


if __name__ == "__main__":
    main()
