"""The segment cache with nothing dropped against transformers' DynamicCache: same tokens first, then prefill and
decode times."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time

import torch
from _harness import table
from transformers import Cache, DynamicCache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.text import text
from kvtool.model import Model, load

LENGTHS, STEPS, REPEATS = (1024, 4096), 64, 3


def run(model: Model, prompt: torch.Tensor, segment: bool) -> tuple[float, list[float], list[int]]:
    """(prefill seconds, decode seconds per step, greedy tokens)."""
    cache = SegmentCache(model) if segment else DynamicCache(config=model.network.config)
    with model.served() if segment else contextlib.nullcontext():
        start = time.perf_counter()
        token = _forward(model, prompt, cache)
        prefill, steps, tokens = time.perf_counter() - start, [], []
        for _ in range(STEPS):
            tokens.append(int(token))
            start = time.perf_counter()
            token = _forward(model, token, cache)
            steps.append(time.perf_counter() - start)
    return prefill, steps, tokens


def _forward(model: Model, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    with torch.no_grad():
        out = model.network(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1)


def main() -> None:
    model, rows = load("smollm2"), []
    for length in LENGTHS:
        prompt = text(model, ["default"], tokens=length, samples=1).samples[0].tokens[None]
        run(model, prompt[:, :64], True)
        prefill: dict[bool, list[float]] = {False: [], True: []}
        decode: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(REPEATS):
            tokens = {}
            for segment in (False, True):
                seconds, steps, tokens[segment] = run(model, prompt, segment)
                prefill[segment].append(seconds)
                decode[segment] += steps
            if tokens[False] != tokens[True]:
                sys.exit(f"parity: tokens differ at length {length}")
        times = [statistics.median(values) for values in (prefill[False], prefill[True], decode[False], decode[True])]
        rows.append((
            length, times[0], times[1], f"{times[1] / times[0]:.2f}×",
            times[2] * 1e3, times[3] * 1e3, f"{times[3] / times[2]:.2f}×",
        ))  # fmt: skip
    columns = (
        "tokens",
        "DynamicCache prefill, s",
        "segments, s",
        "ratio",
        "DynamicCache step, ms",
        "segments, ms",
        "ratio",
    )
    table(f"All-full plan against DynamicCache, {STEPS} greedy tokens equal", columns, rows)


if __name__ == "__main__":
    main()
