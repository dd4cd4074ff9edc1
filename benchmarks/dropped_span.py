"""What remains of a span that was dropped: `span-rule` under every position, against a fresh prompt of the tokens held.

python benchmarks/dropped_span.py [--before 200] [--span 300] [--behind 200] [--after 10]

    before <think> span </think> behind <think> </think>        the last marker ends a step, and the first span goes

The step's time is that of the last token before, and of the one that drops the span; KL is the mean over the tokens fed
after it, in nats.
"""

from __future__ import annotations

import argparse
import time

import torch
from _harness import table

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.text import text
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.replay.forced import forced
from kvtool.replay.subject import Subject
from kvtool.replay.tasks.text import score

MARKERS = ("<think>", "</think>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("before", 200), ("span", 300), ("behind", 200), ("after", 10)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    sizes = [given.before, given.span, given.behind, given.after]
    model = load("smollm2")
    tokens = text(model, ["default"], tokens=sum(sizes), samples=1, half="held-out").samples[0].tokens
    before, span, behind, after = tokens.split(sizes)
    opening, closing = (marker(model, name) for name in MARKERS)
    prompt = torch.cat([before, opening, span, closing, behind, opening, closing])
    held = torch.cat([before, opening, closing, behind, opening, closing])
    fresh, rows = SegmentCache(model), []
    Subject(model, Plan("full", model.fingerprint)).prefill(fresh, held[None])
    known = forced(model, fresh, after[None])[0]
    for position in ("original", "reindex", "reencode"):
        plan = calibrate("span-rule", {"buffer": 1, "position": position}, model=model)
        cache, subject = SegmentCache(model, plan), Subject(model, plan)
        subject.prefill(cache, prompt[None, :-2])
        seconds = []
        for token in prompt[-2:]:
            start = time.perf_counter()
            subject.step(cache, token[None, None])
            seconds.append(time.perf_counter() - start)
        fed = cache.fed_again
        assert bool((cache.entries() == len(held)).all())
        gap = score(known, forced(model, cache, after[None])[0], after)["kl"]
        rows.append((position, fed, *seconds, f"{gap:.1e}"))
    columns = ("position", "tokens fed again", "the step before, s", "the step, s", "KL")
    table(f"A span of {given.span} tokens goes, with {len(behind)} behind it", columns, rows)


def marker(model: Model, name: str) -> torch.Tensor:
    """Its tokens, int64 [n]."""
    assert model.tokenizer is not None
    return torch.tensor(model.tokenizer(name, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
