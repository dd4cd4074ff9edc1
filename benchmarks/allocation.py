"""`allocate` against every uniform plan of its own encodings, at equal bytes, on held-out text.

Errors are measured once. At each level the plan stands beside the uniform pairs (one encoding of all keys, one of all
values) that take no more bits a number than it does, and at most `--near` fewer. Bytes held are those of the cache
after the text, windows included, against the full cache counted in 16 bits.

python benchmarks/allocation.py [--model smollm2] [--levels 2,3,4] [--near 0.5] [--most 24] [--tokens 1024]
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from _harness import table

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.corpus.text import text
from kvtool.measuring.divergence import Judge
from kvtool.methods import _weighing as weigh
from kvtool.methods import allocate
from kvtool.methods._base import Context
from kvtool.model import Model, load
from kvtool.options import build, pairs
from kvtool.plan import Plan
from kvtool.profile import profile
from kvtool.statistics.gram import Gram
from kvtool.trace import Trace


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--levels", default="2,3,4", help="bits a number of encoded entries")
    parser.add_argument("--near", type=float, default=0.5, help="bits that a uniform pair may take less")
    parser.add_argument("--most", type=int, default=24, help="uniform pairs a level, the best by prediction; 0 is all")
    parser.add_argument("--tokens", type=int, default=1024, help="of a held-out prompt")
    parser.add_argument("--steps", type=int, default=256, help="tokens decoded after it")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="options of allocate")
    return parser.parse_args()


def texts(model: Model, given: argparse.Namespace) -> list[Sample]:
    """From the half that nothing was calibrated on."""
    made = text(model, tokens=given.tokens + given.steps, samples=given.texts, half="held-out").samples
    return [replace(s, tokens=s.tokens[: given.tokens], answer=s.tokens[given.tokens :]) for s in made]


def held(model: Model, plan: Plan, sample: Sample) -> float:
    """Bytes of the prompt's cache over those of the full one, both with raw numbers counted as 16 bits."""
    full, cache = SegmentCache(model), SegmentCache(model, plan)
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=sample.tokens[None].to(model.device), past_key_values=full)
    cache.adopt(full)
    wide = model.dtype.itemsize
    sizes = [sum(_sixteen(buffer, wide) for lane in c._all() for buffer in lane.buffers()) for c in (cache, full)]
    return sizes[0] / sizes[1]


def _sixteen(buffer: torch.Tensor, wide: int) -> float:
    """Bytes, where a number of the model's own type counts as two."""
    return buffer.numel() * 2 if buffer.is_floating_point() and buffer.itemsize == wide else buffer.nbytes


def near(context: Context, candidates: weigh.Candidates, bits: float, given: argparse.Namespace) -> list[Any]:
    """Uniform pairs of at most `bits`, and not much fewer; and how many more there are."""
    size = {side: weigh.bits(context, candidates[side]) for side in weigh.SIDES}
    total = {}
    for side in weigh.SIDES:
        ratio = context.resume[f"ratio.{side}"].double()
        total[side] = context.resume[f"effect.{side}"].double().sum((1, 2)) * torch.where(ratio > 0, ratio, 1.0)
    found = []
    for key, value in product(range(len(size["keys"])), range(len(size["values"]))):
        mean = float(size["keys"][key] + size["values"][value]) / 2
        if bits - given.near <= mean <= bits * (1 + 1e-9):
            found.append((float(total["keys"][key] + total["values"][value]), key, value, mean))
    return sorted(found)


def main() -> None:
    given = arguments()
    model = load(given.model)
    trace = Trace(model.fingerprint, given.model, {"gram": Gram(model, model.geometry)})
    profile(model, trace, {"text": text(model, tokens=2048, samples=4, half="calibration")})
    context = Context(model.geometry, model, trace, progress=lambda done, total, what: _say(done, total, what))
    samples = texts(model, given)
    judge, rows = Judge(model, samples), []
    for level in map(float, given.levels.split(",")):
        chosen: dict[str, Any] = {**pairs(given.set), "rivals": 0, "checked": 0}
        options = build(allocate.Options, chosen, "allocate")
        options = replace(options, bytes=options.windows.share(level, options.length))
        decision = allocate.calibrate(context, options)
        candidates = allocate.weighed(context, options, context.resume["met"])
        plan = Plan("allocate", model.fingerprint, store=decision.store)
        found = near(context, candidates, level, given)
        shown = found[: given.most] if given.most else found
        print(f"level {level:g}: {len(shown)} of {len(found)} uniform pairs", file=sys.stderr)
        entrants = [("allocate", "", decision.facts["bits"], decision.facts["predicted"], plan)]
        for predicted, key, value, mean in shown:
            ways = candidates["keys"][key], candidates["values"][value]
            entrants.append(
                (ways[0].name, ways[1].name, mean, predicted, weigh.uniform(context, *ways, options.windows))
            )
        scored = [(*entrant, *judged(judge, entrant[4])) for entrant in entrants]
        best = sorted(scored[1:], key=lambda row: row[5])
        for keys, values, mean, predicted, entrant, kl, ratio in [scored[0], *best[:6], *best[-1:]]:
            rows.append((level, keys, values, mean, f"{held(model, entrant, samples[0]):.3f}", predicted, kl, ratio))
    columns = ("level, bits", "keys", "values", "bits", "held", "KL predicted", "KL", "perplexity ratio")
    title = f"allocate and uniform plans of its encodings, {given.texts} held-out texts of {given.tokens}+{given.steps}"
    table(title, columns, rows)


def judged(judge: Judge, plan: Plan) -> tuple[float, float]:
    """KL and perplexity ratio, means over the texts."""
    found = judge.judged(plan)
    return float(found[:, 0].mean()), math.exp(float(found[:, 1].mean()))


def _say(done: int, total: int, what: str) -> None:
    print(f"\r{done}/{total} {what:40.40}", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
