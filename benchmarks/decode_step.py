"""One decode step of SmolLM2 under several plans against the full fp32 cache: time, bytes held and bytes read.

python benchmarks/decode_step.py [--length 8000] [--steps 24] [--only kivi gear reads]

All plans start from one dense prefill, and those of a group take turns with the full cache, so that a busy machine
slows all. Parity first: with 8-bit entries every next token's log-probability must be the full cache's to 0.1. A method
that cannot be had here is named with its error.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from _harness import medians, table
from decode_cases import GROUPS

from kvtool import options
from kvtool import plan as plans
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate, method, reads
from kvtool.commands._shelf import find
from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.plan import Plan, compose
from kvtool.profile import profile
from kvtool.replay.subject import Subject
from kvtool.trace import Trace, statistic

SLOTS = "heads, pages, and both with codes"
COLUMNS = ("plan", "step, ms", "time ÷ full", "bytes held ÷ full", "bytes read ÷ full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8000, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=24, help="steps of each cache")
    parser.add_argument("--only", nargs="+", default=[""], help="plans and groups whose name contains one of these")
    given = parser.parse_args()
    model = load("smollm2")
    made = {**encoded(model, given.only), SLOTS: slots(model, given.only)}
    parity = calibrate("kivi", {"bits": 8}, model=model)
    tokens = text(model, ["default"], tokens=given.length, samples=1).samples[0].tokens[None]
    prefilled, subject, last = SegmentCache(model), Subject(model, parity), tokens[:, -1:]
    prefilled.record_for(parity, *(plan for group in made.values() for plan in group.values()))
    subject.prefill(prefilled, tokens[:, :-1])

    def adopted(plan: Plan | None) -> SegmentCache:
        cache = SegmentCache(model, plan, prompt_length=given.length - 1)
        cache.adopt(prefilled)
        return cache

    near = [subject.step(adopted(plan), last).log_softmax(-1) for plan in (parity, None)]
    if (drift := float((near[0] - near[1]).abs().max())) > 0.1:
        sys.exit(f"parity: 8-bit entries move a log-probability by {drift:.3f}")
    for group, entries in made.items():
        caches = {"full": adopted(None)}
        for name, plan in entries.items():
            print(f"filling {name}", file=sys.stderr, flush=True)
            try:
                caches[name] = adopted(plan)
            except InputError as error:
                print(f"{name}: {error}", file=sys.stderr)
        if len(caches) > 1:
            title = f"{group}: a decode step of SmolLM2 in fp32 at {given.length} tokens, median of {given.steps}"
            measure(title, subject, caches, last, given.steps)


def measure(title: str, subject: Subject, caches: dict[str, SegmentCache], token: torch.Tensor, steps: int) -> None:
    """A table of caches, the full one first, that all go on from one prompt."""
    full = caches["full"]
    for cache in caches.values():
        subject.step(cache, token)
    seconds = medians({name: partial(subject.step, cache, token) for name, cache in caches.items()}, steps)
    rows = [
        (
            name, 1000 * seconds[name], f"{seconds[name] / seconds['full']:.2f}×", f"{cache.nbytes / full.nbytes:.3f}",
            f"{cache.read_bytes / full.read_bytes:.3f}",
        )
        for name, cache in caches.items()
    ]  # fmt: skip
    table(title, COLUMNS, rows)


def encoded(model: Model, only: list[str]) -> dict[str, dict[str, Plan]]:
    """The plans of every group, calibrated on a short text."""
    chosen = {group: {name: case for name, case in cases.items() if wanted(f"{group}: {name}", only)}
              for group, cases in GROUPS.items()}  # fmt: skip
    every = [case for cases in chosen.values() for case in cases.values()]
    modules = [(name, method(name), settings) for name, settings in every]
    needed = {stat for name, module, settings in modules
              for stat in reads(module, options.build(module.Options, settings, name))}  # fmt: skip
    trace = Trace(model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in needed})
    short = text(model, tokens=1024, samples=2, half="calibration")
    if needed:
        profile(model, trace, {stat.corpus: short for stat in trace.statistics.values()})
    return {group: made(model, trace, cases) for group, cases in chosen.items()}


def made(model: Model, trace: Trace, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Plan]:
    found = {}
    for title, (name, settings) in cases.items():
        print(f"calibrating {title}", file=sys.stderr, flush=True)
        try:
            found[title] = calibrate(name, settings, model=model, trace=trace)
        except InputError as error:
            print(f"{title}: {error}", file=sys.stderr)
    return found


def slots(model: Model, only: list[str]) -> dict[str, Plan]:
    """Heads that keep less, pages that are read, and both with codes."""
    names = ("duo 50 %", "duo 50 % + 4-bit", "quest 10 %", "quest 10 % + 4-bit")
    if not any(wanted(f"{SLOTS}: {name}", only) for name in names):
        return {}
    duo, four = plans.read(find("smollm2.duo-50")), calibrate("kivi", {"bits": 4}, model=model)
    quest = calibrate("quest", {"page": 32}, model=model)
    entries = (duo, compose(duo, four), quest, compose(quest, four))
    return {name: plan for name, plan in zip(names, entries, strict=True) if wanted(f"{SLOTS}: {name}", only)}


def wanted(name: str, only: list[str]) -> bool:
    return any(part in name for part in only)


if __name__ == "__main__":
    main()
