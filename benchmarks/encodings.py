"""What encodings cost in quality: held-out text decoded under each, with the bits a coded number really takes.

python benchmarks/encodings.py [--samples 4] [--prompt 1000] [--tokens 128] [--only kivi,kvquant] [--trace FILE]

Each text is prefilled once, and every plan goes on from that. Bits are those of what left the raw window, from the
buffers of the cache, each prompt's own bases included; bases that come with the plan are not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

import torch
from _harness import table
from encoding_cases import CASES, WINDOW

from kvtool.cache.bulk import Bulk
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.store.pool import Member
from kvtool.calibrate import calibrate, method, reads
from kvtool.commands import _corpora
from kvtool.commands.calibrate import TEXT
from kvtool.commands.profile import take
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.options import build
from kvtool.plan import Plan
from kvtool.replay.forced import forced
from kvtool.replay.tasks import text
from kvtool.trace import Trace, read, statistic


def coded(cache: SegmentCache) -> tuple[int, int]:
    """Bits, and numbers, of what left the raw windows."""
    bits, numbers = 0, 0
    for layer in cache.segments:
        for lane in layer.lanes():
            if not isinstance(lane, Bulk):
                continue
            for part in (lane.bulk, *([lane.rest] if isinstance(lane, Thinned) and lane.rest is not None else [])):
                width = sum(lane.recent.recall()[side].shape[-1] for side in (0, 1)) if part.length else 0
                numbers += part.length * width * len(lane.heads)
                bits += 8 * sum(buffer.nbytes for buffer in part.buffers())
                assert not isinstance(part, Member) or part.pool.waiting == {}
    return bits, numbers


def plans(model: Model, only: set[str], seen: str) -> Iterator[tuple[str, str, str, Plan | str]]:
    """(title, method, options, plan or why there is none)."""
    chosen = [(title, name, settings) for title, entries in CASES for name, settings in entries]
    chosen = [entry for entry in chosen if not only or entry[1] in only]
    wanted: set[str] = set()
    for _, name, settings in chosen:
        module = method(name)
        wanted |= set(reads(module, build(module.Options, settings, name)))
    trace = read(seen) if seen else _trace(model, wanted) if wanted else None
    made: dict[str, Plan | str] = {}
    for title, name, settings in chosen:
        told = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in WINDOW) or "defaults"
        key = f"{name} {told}"
        if key not in made:
            print(f"calibrating {key}", file=sys.stderr, flush=True)
            try:
                made[key] = calibrate(name, settings, model=model, trace=trace)
            except InputError as error:
                made[key] = str(error)
        yield title, name, told, made[key]


def _trace(model: Model, wanted: set[str]) -> Trace:
    seen = Trace(model.fingerprint, model.name, {name: statistic(name)(model, model.geometry) for name in wanted})
    take(model, seen, _corpora.build(model, {stat.corpus for stat in seen.statistics.values()}, TEXT, {}, 0), "-")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--only", default="")
    parser.add_argument("--trace", default="", help="of kvtool profile, instead of a new one")
    asked = parser.parse_args()
    model = load("smollm2")
    options = text.Options(prompt=asked.prompt, tokens=asked.tokens, samples=asked.samples)
    entries = list(plans(model, set(asked.only.split(",")) - {""}, asked.trace))
    scores: dict[str, list[dict[str, float]]] = {}
    held: dict[str, tuple[int, int]] = {}
    for sample in text.compared(model, options, asked.prompt, 0).samples:
        full = _prefilled(model, None, sample.tokens[None, :-1])
        tokens = torch.cat([sample.tokens[-1:], sample.answer])[None]
        known = _continued(model, None, full, tokens)[0]
        for key, plan in {f"{name} {told}": plan for _, name, told, plan in entries}.items():
            if not isinstance(plan, str):
                logits, held[key] = _continued(model, plan, full, tokens)
                scores.setdefault(key, []).append(text.score(known, logits, sample.answer))
                print(f"{key}: {scores[key][-1]['kl']:.4f}", file=sys.stderr, flush=True)
    for title in dict.fromkeys(title for title, *_ in entries):
        rows = [_row(name, told, plan, scores, held) for own, name, told, plan in entries if own == title]
        table(title, ("method", "options", "bits held", "perplexity ×", "KL", "top-1"), rows)


def _row(
    name: str, told: str, plan: Plan | str, scores: dict[str, list[dict[str, float]]], held: dict[str, tuple[int, int]]
) -> list[str]:
    if isinstance(plan, str):
        return [f"`{name}`", told, plan, "", "", ""]
    tally, (bits, numbers) = text.tally(scores[f"{name} {told}"]), held[f"{name} {told}"]
    quality = [f"{tally['perplexity_ratio']:.4f}", f"{tally['kl']:.4f}", f"{tally['agreement']:.3f}"]
    return [f"`{name}`", told, f"{bits / max(numbers, 1):.2f}", *quality]


def _prefilled(model: Model, plan: Plan | None, tokens: torch.Tensor) -> SegmentCache:
    cache = SegmentCache(model, plan, prompt_length=tokens.shape[1])
    for layer in cache.segments:
        layer.record = -1
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=tokens, past_key_values=cache)
    return cache


def _continued(
    model: Model, plan: Plan | None, full: SegmentCache, tokens: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Logits [A,V] under a plan that goes on from the full cache, and what it holds coded."""
    cache = SegmentCache(model, plan, prompt_length=full.segments[0].columns)
    cache.adopt(full)
    bits = coded(cache)
    logits = forced(model, cache, tokens[:, :-1])[0]
    assert math.isfinite(float(logits.sum()))
    return logits, bits


if __name__ == "__main__":
    main()
