"""One decode step of SmolLM2 under several plans against the full fp32 cache: time, bytes held and bytes read.

All plans start from one dense prefill and take turns, so that a busy machine slows all. Parity first: with 8-bit
entries every next token's log-probability must be the full cache's to 0.1.
"""

from __future__ import annotations

import sys
from functools import partial

from _harness import medians, table

from kvtool import plan as plans
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.text import text
from kvtool.model import load
from kvtool.plan import compose
from kvtool.replay.subject import Subject

LENGTH, STEPS = 8000, 24


def main() -> None:
    model = load("smollm2")
    prompt = text(model, ["default"], tokens=LENGTH, samples=1).samples[0].tokens[None]
    duo = plans.read("calibrations/smollm2.duo-50.plan.safetensors")
    kivi = {bits: calibrate("kivi", {"bits": bits}, model=model) for bits in (8, 4, 2)}
    quest = calibrate("quest", {"page": 32}, model=model)
    subjects = {
        "4-bit": kivi[4], "2-bit": kivi[2], "duo 50 %": duo, "duo 50 % + 4-bit": compose(duo, kivi[4]),
        "quest 10 %": quest, "quest 10 % + 4-bit": compose(quest, kivi[4]),
    }  # fmt: skip
    full, subject, token = SegmentCache(model), Subject(model, kivi[4]), prompt[:, -1:]
    subject.prefill(full, prompt[:, :-1])
    caches = {name: SegmentCache(model, made) for name, made in {"parity": kivi[8], **subjects}.items()}
    for cache in caches.values():
        cache.adopt(full)
    near = [subject.step(cache, token).log_softmax(-1) for cache in (caches.pop("parity"), full)]
    if (drift := float((near[0] - near[1]).abs().max())) > 0.1:
        sys.exit(f"parity: 8-bit entries move a log-probability by {drift:.3f}")
    for cache in caches.values():
        subject.step(cache, token)
    caches = {"full": full, **caches}
    seconds = medians({name: partial(subject.step, cache, token) for name, cache in caches.items()}, STEPS)
    rows = [
        (
            name, 1000 * seconds[name], f"{seconds[name] / seconds['full']:.2f}×", f"{cache.nbytes / full.nbytes:.3f}",
            f"{cache.read_bytes / full.read_bytes:.3f}",
        )
        for name, cache in caches.items()
    ]  # fmt: skip
    columns = ("plan", "step, ms", "time ÷ full", "bytes held ÷ full", "bytes read ÷ full")
    table(f"One decode step of SmolLM2 in fp32 at {LENGTH} tokens, median of {STEPS}", columns, rows)


if __name__ == "__main__":
    main()
