"""One decode step of SmolLM2 under several plans against the full fp32 cache: time, bytes held and bytes read.

All plans start from one dense prefill and take turns, so that a busy machine slows all. Parity first: with 8-bit
entries every next token's log-probability must be the full cache's to 0.1.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from _harness import medians, table

from kvtool import plan as plans
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate, method
from kvtool.corpus.text import text
from kvtool.model import Model, load
from kvtool.plan import Plan, compose
from kvtool.profile import profile
from kvtool.replay.subject import Subject
from kvtool.trace import Trace, statistic

CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi, 4 bits": ("kivi", {"bits": 4}),
    "kivi, 3 bits": ("kivi", {"bits": 3}),
    "kivi, 2 bits": ("kivi", {"bits": 2}),
    "saq": ("saq", {}),
    "turboquant, 4 bits": ("turboquant", {"keys": 4, "values": 4}),
    "zipcache": ("zipcache", {}),
    "kvquant, 4 bits": ("kvquant", {"bits": 4}),
    "kvquant, 4 bits, no outliers": ("kvquant", {"bits": 4, "outliers": 0.0}),
    "think": ("think", {}),
    "palu, half the rank": ("palu", {"budget": 0.5, "ranks": "energy"}),
    "palu, half the rank, 4 bits": ("palu", {"budget": 0.125, "bits": 4, "ranks": "energy"}),
    "eigen, half the rank": ("eigen", {"budget": 0.5}),
    "xkv": ("xkv", {}),
    "minicache": ("minicache", {}),
}


def main() -> None:
    given = arguments()
    model = load("smollm2")
    prompt = text(model, ["default"], tokens=given.length, samples=1).samples[0].tokens[None]
    parity = calibrate("kivi", {"bits": 8}, model=model)
    subjects = {**codecs(model, given.only), **slots(model, given.only)}
    full, subject, token = SegmentCache(model), Subject(model, parity), prompt[:, -1:]
    full.record_for(*subjects.values())
    subject.prefill(full, prompt[:, :-1])
    caches = {name: SegmentCache(model, made) for name, made in {"parity": parity, **subjects}.items()}
    for cache in caches.values():
        cache.adopt(full)
    near = [subject.step(cache, token).log_softmax(-1) for cache in (caches.pop("parity"), full)]
    if (drift := float((near[0] - near[1]).abs().max())) > 0.1:
        sys.exit(f"parity: 8-bit entries move a log-probability by {drift:.3f}")
    for cache in caches.values():
        subject.step(cache, token)
    caches = {"full": full, **caches}
    seconds = medians({name: partial(subject.step, cache, token) for name, cache in caches.items()}, given.steps)
    rows = [
        (
            name, 1000 * seconds[name], f"{seconds[name] / seconds['full']:.2f}×", f"{cache.nbytes / full.nbytes:.3f}",
            f"{cache.read_bytes / full.read_bytes:.3f}",
        )
        for name, cache in caches.items()
    ]  # fmt: skip
    columns = ("plan", "step, ms", "time ÷ full", "bytes held ÷ full", "bytes read ÷ full")
    table(f"One decode step of SmolLM2 in fp32 at {given.length} tokens, median of {given.steps}", columns, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8000, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=24, help="steps of each cache")
    parser.add_argument("--only", nargs="+", default=[""], help="plans whose name contains one of these")
    return parser.parse_args()


def wanted(name: str, only: list[str]) -> bool:
    return any(part in name for part in only)


def codecs(model: Model, only: list[str]) -> dict[str, Plan]:
    """One plan for each way of encoding, calibrated on a short text."""
    chosen = {name: case for name, case in CODECS.items() if wanted(name, only)}
    names = sorted({stat for name, _ in chosen.values() for stat in method(name).STATISTICS})
    trace = Trace(model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in names})
    short = text(model, tokens=1024, samples=2, half="calibration")
    profile(model, trace, {stat.corpus: short for stat in trace.statistics.values()})
    return {title: calibrate(name, options, model=model, trace=trace) for title, (name, options) in chosen.items()}


def slots(model: Model, only: list[str]) -> dict[str, Plan]:
    """Heads that keep less, pages that are read, and both with codes."""
    duo, four = plans.read("calibrations/smollm2.duo-50.plan.safetensors"), calibrate("kivi", {"bits": 4}, model=model)
    quest = calibrate("quest", {"page": 32}, model=model)
    made = {
        "duo 50 %": duo, "duo 50 % + 4-bit": compose(duo, four),
        "quest 10 %": quest, "quest 10 % + 4-bit": compose(quest, four),
    }  # fmt: skip
    return {name: plan for name, plan in made.items() if wanted(name, only)}


if __name__ == "__main__":
    main()
