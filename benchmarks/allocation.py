"""`allocate` against every uniform plan of its own encodings, at equal bytes, on held-out text.

Errors are measured once. At each level the plan stands beside the uniform pairs (one encoding of all keys, one of all
values, each alike in all layers or in all groups of layers) that take no more bits a number than it does, and at most
`--near` fewer. Bytes held are those of the cache after the text, windows included, against the full cache counted in 16
bits.

All pairs are decoded, the best by prediction first, and each text by text for as long as it may be among the best
`--shown` or beat the plan: divergences are never negative, so that a pair whose sum on the texts so far is too large is
out, whatever the others would add. How many pairs there are is said before the first is decoded. `--journal` keeps
what was measured, and goes on from it.

python benchmarks/allocation.py [--model smollm2] [--levels 2,3,4] [--near 0.5] [--most 0] [--tokens 1024]
    [--journal FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import table
from safetensors.torch import load_file, save_file

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.corpus.text import text
from kvtool.measuring.divergence import Judge
from kvtool.methods import _holding as hold
from kvtool.methods import _weighing as weigh
from kvtool.methods import allocate
from kvtool.methods._base import Context
from kvtool.model import Model, load
from kvtool.options import build, pairs
from kvtool.plan import Plan
from kvtool.profile import profile
from kvtool.trace import Trace, statistic


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--levels", default="2,3,4", help="bits a number of encoded entries")
    parser.add_argument("--near", type=float, default=0.5, help="bits that a uniform pair may take less")
    parser.add_argument("--most", type=int, default=0, help="uniform pairs a level, the best by prediction; 0 is all")
    parser.add_argument("--shown", type=int, default=6, help="uniform pairs a level that are decoded to the end")
    parser.add_argument("--journal", help="file that keeps what was measured; its errors are in FILE.errors")
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


class Entrant(NamedTuple):
    """A uniform pair: predicted KL, the two candidates, and bits a number in the mean."""

    predicted: float
    key: int
    value: int
    bits: float


def near(context: Context, candidates: hold.Candidates, bits: float, given: argparse.Namespace) -> list[Entrant]:
    """Uniform pairs of at most `bits`, and not much fewer, the best by prediction first."""
    size = {side: weigh.bits(context, candidates[side]) for side in hold.SIDES}
    total = {}
    for side in hold.SIDES:
        ratio = context.resume[f"ratio.{side}"].double()
        total[side] = context.resume[f"effect.{side}"].double().sum((1, 2)) * torch.where(ratio > 0, ratio, 1.0)
    found = []
    for key, value in product(range(len(size["keys"])), range(len(size["values"]))):
        mean = float(size["keys"][key] + size["values"][value]) / 2
        fits = hold.together(candidates["keys"][key], candidates["values"][value])
        if fits and bits - given.near <= mean <= bits * (1 + 1e-9):
            found.append(Entrant(float(total["keys"][key] + total["values"][value]), key, value, mean))
    return sorted(found)[: given.most or None]


class Journal:
    """What was measured of every plan, (KL, loss) by text, in a file of one JSON object a line: its first says what
    for."""

    def __init__(self, given: argparse.Namespace):
        self.path = None if given.journal is None else Path(given.journal)
        self.rows: dict[str, list[list[float]]] = {}
        head = {name: getattr(given, name) for name in ("model", "tokens", "steps", "texts", "set")}
        if self.path is None:
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        if lines and lines[0] != head:
            raise SystemExit(f"{self.path} is of another run: {lines[0]}")
        for line in lines[1:]:
            self.rows[line["plan"]] = line["texts"]
        if not lines:
            self.path.write_text(json.dumps(head) + "\n")

    @property
    def errors(self) -> dict[str, torch.Tensor]:
        """Of encodings, as far as they were measured."""
        return load_file(f"{self.path}.errors") if self.path and Path(f"{self.path}.errors").exists() else {}

    def keep(self, errors: dict[str, torch.Tensor]) -> None:
        if self.path is not None:
            save_file({name: tensor.contiguous() for name, tensor in errors.items()}, f"{self.path}.errors")

    def judged(self, judge: Judge, name: str, plan: Plan, most: float) -> tuple[float, float] | None:
        """Mean KL and perplexity ratio, or None as soon as the KL cannot but be above `most`."""
        rows, count = self.rows.setdefault(name, []), len(judge.texts)
        while sum(row[0] for row in rows) <= most * count:
            if len(rows) == count:
                return sum(row[0] for row in rows) / count, math.exp(sum(row[1] for row in rows) / count)
            rows.append(judge.on(len(rows), plan).tolist())
            if self.path is not None:
                with self.path.open("a") as file:
                    print(json.dumps({"plan": name, "texts": rows}), file=file)
        return None


def measured(given: argparse.Namespace, model: Model, journal: Journal) -> Context:
    """A trace of what candidates are made of, and errors so far."""
    trace = Trace(model.fingerprint, given.model)
    for name in allocate.reads(build(allocate.Options, pairs(given.set), "allocate")):
        trace.statistics[name] = statistic(name)(model, model.geometry)
    profile(model, trace, {"text": text(model, tokens=2048, samples=4, half="calibration")})
    return Context(model.geometry, model, trace, progress=_say, resume=journal.errors, checkpoint=journal.keep)


def main() -> None:
    given = arguments()
    model, journal = load(given.model), Journal(given)
    context = measured(given, model, journal)
    samples, levels = texts(model, given), [float(level) for level in given.levels.split(",")]
    made, found = {}, {}
    for level in levels:
        options = build(allocate.Options, {**pairs(given.set), "rivals": 0, "checked": 0}, "allocate")
        options = replace(options, bytes=options.windows.share(level, options.length))
        made[level] = allocate.calibrate(context, options)
    candidates = allocate.weighed(context, options, weigh.known(context))
    for level in levels:
        found[level] = near(context, candidates, level, given)
    counts = ", ".join(f"{len(found[level])} at {level:g} bits" for level in levels)
    print(f"uniform pairs to be decoded: {counts}, {sum(map(len, found.values()))} in all", file=sys.stderr)
    judge, rows = Judge(model, samples), []
    for level in levels:
        decision, plan = made[level], Plan("allocate", model.fingerprint, store=made[level].store)
        began = time.monotonic()
        own = journal.judged(judge, f"allocate {level:g}", plan, math.inf)
        assert own is not None
        seconds = time.monotonic() - began
        print(f"level {level:g}: {seconds:.0f} s a plan on all texts", file=sys.stderr)
        share = f"{held(model, plan, samples[0]):.3f}"
        facts = decision.facts
        rows.append((level, "allocate", _shares(decision.store), facts["bits"], share, facts["predicted"], *own))
        best: list[tuple[float, float, Entrant, Plan]] = []
        for number, pair in enumerate(found[level], 1):
            ways = candidates["keys"][pair.key], candidates["values"][pair.value]
            entrant = hold.uniform(context, *ways, options.windows)
            bound = max(own[0], best[given.shown - 1][0]) if len(best) >= given.shown else math.inf
            score = journal.judged(judge, f"{ways[0].name}, {ways[1].name}", entrant, bound)
            if score is not None:
                best = sorted([*best, (*score, pair, entrant)], key=lambda row: row[0])
            _say(number, len(found[level]), f"level {level:g}")
        for kl, ratio, pair, entrant in best[: given.shown]:
            names = candidates["keys"][pair.key].name, candidates["values"][pair.value].name
            share = f"{held(model, entrant, samples[0]):.3f}"
            rows.append((level, *names, pair.bits, share, pair.predicted, kl, ratio))
        better = sum(kl < own[0] for kl, *_ in best)
        print(f"level {level:g}: {better} of {len(found[level])} uniform pairs are better", file=sys.stderr)
    columns = ("level, bits", "keys", "values", "bits", "held", "KL predicted", "KL", "perplexity ratio")
    title = f"allocate and uniform plans of its encodings, {given.texts} held-out texts of {given.tokens}+{given.steps}"
    table(title, columns, rows)


def _shares(store: Any) -> str:
    """How many layers share."""
    count = sum(map(len, store.spans))
    return f"{count} layers in {len(store.spans)} groups" if count else ""


def _say(done: int, total: int, what: str) -> None:
    print(f"\r{done}/{total} {what:40.40}", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
