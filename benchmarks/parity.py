"""Kept sets against a public implementation, NVIDIA's kvpress: the same weights, the same prompts, the same options.

    agreement = Σ |A ∩ B| ÷ Σ max(|A|, |B|)   over layers and KV heads, A what kvtool holds, B what the peer keeps

    python benchmarks/parity.py --peer PYTHON [--lengths 1000,4000] [--prompts passkey,text] [--ratios 0.5,0.75]
        [--only snapkv,adakv]

PYTHON is an interpreter with kvpress in an environment of its own: `parity_peer.py` is run by it, and nothing of it is
imported here. What kvtool holds is read from the cache, keys found again by their bits, never from scores. Rows that
should agree and do not make the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import table
from parity_cases import CASES, Setting
from parity_rows import held
from safetensors.torch import load_file, save_file

from kvtool.cache.lane import Lane
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.window import Window
from kvtool.calibrate import calibrate
from kvtool.corpus.passkey import passkey
from kvtool.corpus.text import text
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.profile import profile
from kvtool.replay.subject import Subject
from kvtool.trace import Trace, statistic

LEAST = 0.99  # what a row that says the same on both sides must reach
HERE = Path(__file__).parent


def prompts(model: Model, lengths: list[int], kinds: list[str]) -> dict[str, torch.Tensor]:
    """Name → tokens int64 [T]."""
    make = {
        "passkey": lambda length: passkey(model, lengths=[length], depths=[0.5], keys=1, seed=1),
        "text": lambda length: text(model, tokens=length, samples=1, seed=1, half="held-out"),
    }
    return {f"{kind} {length}": make[kind](length).samples[0].tokens for length in lengths for kind in kinds}


def expectations(model: Model) -> Trace:
    """A trace of what queries are like on text that no prompt is of."""
    trace = Trace(model.fingerprint, model.name, {"queries": statistic("queries")(model, model.geometry)})
    profile(model, trace, {"text": text(model, tokens=1024, samples=2, seed=1, half="calibration")})
    return trace


def tables(trace: Trace) -> dict[str, torch.Tensor]:
    """The mean and covariance of queries that our plan carries, for the peer to go by the same."""
    keep = calibrate("expected-attention", {}, trace=trace).keep
    assert keep is not None
    assert keep.select is not None
    return keep.select.tables


def peer(
    python: str, model: Model, asked: dict[str, torch.Tensor], jobs: dict[str, Any], law: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`prompt/job` → bool [L,K,S], what the peer keeps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.network.save_pretrained(folder / "network")
        save_file(asked, folder / "prompts.safetensors")
        save_file(law, folder / "statistics.safetensors")
        (folder / "job.json").write_text(json.dumps(jobs))
        versions = subprocess.run(
            [python, HERE / "parity_peer.py", folder], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        print(f"peer: {versions.strip()}", file=sys.stderr)
        return {key: mask.bool() for key, mask in load_file(folder / "kept.safetensors").items()}


def dense(model: Model, tokens: torch.Tensor) -> SegmentCache:
    """The full cache of a prompt, with all queries beside it for the selections that look at them."""
    cache = SegmentCache(model)
    for layer in cache.segments:
        layer.record = -1
    Subject(model, Plan("full", model.fingerprint)).prefill(cache, tokens[None])
    return cache


def kept(full: SegmentCache, model: Model, plan: Plan, entries: int) -> torch.Tensor:
    """bool [L,K,S]: the prompt's entries that a cache of the plan holds."""
    cache = SegmentCache(model, plan, prompt_length=entries)
    cache.adopt(full)
    masks = torch.zeros(model.geometry.layers, model.geometry.kv_heads, entries, dtype=torch.bool)
    for mask, mine, theirs in zip(masks, cache.segments, full.segments, strict=True):
        (everything,) = theirs.lanes()
        keys = everything.recall()[0][0]
        for lane in mine.lanes():
            mask[lane.heads] = held(keys[lane.heads], _keys(lane))
    return masks


def _keys(lane: Lane) -> torch.Tensor:
    """Keys [K,N,D] that a lane holds of its one row, in any order."""
    if isinstance(lane, Window):  # recall() is of its recent entries only
        return next(lane.buffers())[0, :, : lane.entries()]
    return lane.recall()[0][0]


@dataclass
class Tally:
    """Of one case over all prompts and ratios: entries of both sides, and the lowest agreements."""

    both: int = 0
    most: int = 0
    sizes: tuple[int, int] = (0, 0)
    least: float = 1.0
    least_layer: float = 1.0

    def add(self, mine: torch.Tensor, theirs: torch.Tensor) -> float:
        """bool [L,K,S] twice → their agreement."""
        both, most = (mine & theirs).sum(-1), torch.maximum(mine.sum(-1), theirs.sum(-1))
        share = float(both.sum() / most.sum())
        self.both, self.most = self.both + int(both.sum()), self.most + int(most.sum())
        self.sizes = (self.sizes[0] + int(mine.sum()), self.sizes[1] + int(theirs.sum()))
        self.least = min(self.least, share)
        self.least_layer = min(self.least_layer, float((both.sum(1) / most.sum(1)).min()))
        return share

    def cells(self) -> list[str]:
        numbers = (self.sizes[0] / self.sizes[1], self.both / self.most, self.least, self.least_layer)
        return [f"{number:.4f}" for number in numbers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", default="1000,4000")
    parser.add_argument("--prompts", default="passkey,text")
    parser.add_argument("--ratios", default="0.5,0.75")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    model, ratios = load(chosen.model), [float(ratio) for ratio in chosen.ratios.split(",")]
    cases = [case for case in CASES if not chosen.only or case.method in chosen.only.split(",")]
    asked = prompts(model, [int(length) for length in chosen.lengths.split(",")], chosen.prompts.split(","))
    jobs = {f"{at} {ratio}": {**vars(case.press), "ratio": ratio} for at, case in enumerate(cases) for ratio in ratios}
    trace = expectations(model)
    theirs, tallies = peer(chosen.peer, model, asked, jobs, tables(trace)), [Tally() for _ in cases]
    for prompt, tokens in asked.items():
        full, entries = dense(model, tokens), len(tokens)
        for at, case in enumerate(cases):
            for ratio in ratios:
                plan = case.plan(Setting(model, trace, entries, int(entries * (1 - ratio))))
                share = tallies[at].add(kept(full, model, plan, entries), theirs[f"{prompt}/{at} {ratio}"])
                print(f"{case.method}  {case.ours}  {prompt}  {ratio}  {share:.4f}", file=sys.stderr, flush=True)
    rows = [
        [case.method, case.ours, case.press.shown, "same" if case.same else "not the same", *tally.cells()]
        for case, tally in zip(cases, tallies, strict=True)
    ]
    numbers = ("entries held ÷ peer's", "agreement", "least prompt", "least layer")
    columns = ("method", "kvtool", "kvpress", "reading", *numbers)
    table(f"{chosen.prompts} of {chosen.lengths} tokens, {chosen.ratios} of the entries dropped", columns, rows)
    return int(any(case.same and tally.least < LEAST for case, tally in zip(cases, tallies, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
