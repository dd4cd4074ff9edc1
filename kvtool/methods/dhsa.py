"""DHSA: while the prompt is read, each block of queries reads the chunks that its mean query asks for.

Xiong et al., arXiv 2510.24606 (2025), with its released code, both versions.

    chunks lie between predicted boundaries;   rep(chunk) = √n · k̄,   k̄: mean over all heads and the chunk's n keys
    a block of `block` queries reads, besides itself, `budget` earlier entries: `local` ones right before it, and those
    of the chunks with the largest q̄ · rep(chunk), q̄ the mean over its queries and all heads; the last `dense` queries
    of the prompt read everything;   operations of attention ≈ Σ_blocks (budget + block/2) instead of N²/2

For n independent keys √n · k̄ has the spread of one key, whatever n is; the plain mean's falls with n, so that long
chunks would never be far from average. All entries stay, and decode steps read all of them: prefill alone is cheaper.

A boundary is a place where later rows of a dense pass look very differently at the `window` entries before and after
it: the larger sum over the smaller one exceeds `theta`, and no larger ratio lies within `apart` places. Labels need
later rows, so a small network learns them from the keys on both sides (`cache/read/boundaries/`), on texts of the
calibration half; boundaries are made once, at layer `layer`, for all layers (those before it read everything).

`mode=labels` is the first version without the network: boundaries from that layer's own dense pass over the prompt, an
upper bound. The second version has fixed blocks of keys: `mode=blocks` (means, each head by itself), `mode=a-shape`
(the same, the first and the nearest block always among them), `mode=vertical-slash` (columns and diagonals by the
prompt's last queries, half of the budget each). Published: budget 2,048 entries (first) or a density of 0.125 (second),
block 128, units of 32, 64 local, 64 dense, window 4, θ 1.1, 8 apart, 8 boundaries a block.

Where we depart: the first `sink` entries are always read (0: as published); a block reads itself and `local` entries
before it, where the release counts 64 before its last query; of the last chunk the newest entries are read, where its
ties fall as they may; keys are read before RoPE, so that a boundary does not depend on where the prompt stands; labels
are of one layer, and no other layer's labels are used. The network is smaller, and trained on the default text, not on
Long-Data-Collections, TriviaQA and ChatQA2. Layers with a sliding window of their own read it. The second version's
kernel reads whole blocks of what diagonals hit; here a block of queries reads exactly the entries that they hit. The
shapes of the network's encoder are ours (card C9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods import _boundaries, _training
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Prefill, Read

STATISTICS = ()
MODEL = True
REUSE = "weights"

V2: dict[str, dict[str, Any]] = {
    "blocks": dict(heads="each"),
    "a-shape": dict(heads="each"),
    "vertical-slash": dict(heads="each", rule="vertical-slash"),
}


@dataclass(frozen=True)
class Options:
    """budget: earlier entries that a block of queries reads, a share of the prompt when at most 1, else a count. mode:
    what is chosen: chunks between predicted boundaries or between labels, blocks of keys, these with the first and the
    nearest always among them (a-shape), or columns and diagonals (vertical-slash). block: queries that choose together.
    unit: keys of a block, where blocks are chosen. sink, local: first entries, and entries right before a block, that
    it always reads. dense: last queries of the prompt that read everything. layer: whose keys make the boundaries;
    layers before it read everything. window: entries on both sides of a place that boundaries are told by. theta: ratio
    above which a place is a boundary. sure: probability above which the network says so. apart: places around a
    boundary where there is no other. most: boundaries for each block at most. width, hidden: of the network. samples,
    tokens: training texts and their length; a quarter of the texts is held out to measure it. steps: optimiser steps,
    one text each. lr: learning rate. weights: take the network of this plan instead of training."""

    budget: float = 0.25
    mode: Literal["predicted", "labels", "blocks", "a-shape", "vertical-slash"] = "predicted"
    block: int = 128
    unit: int = 32
    sink: int = 4
    local: int = 64
    dense: int = 64
    layer: int = 0
    window: int = 4
    theta: float = 1.1
    sure: float = 0.5
    apart: int = 8
    most: int = 8
    width: int = 32
    hidden: int = 64
    samples: int = 16
    tokens: int = 512
    steps: int = 300
    lr: float = 3e-3
    weights: str = ""

    def __post_init__(self) -> None:
        at_least(1, self, "block", "unit", "window", "most", "width", "hidden", "tokens", "steps")
        at_least(0, self, "sink", "local", "dense", "layer", "apart")
        at_least(4, self, "samples")
        if self.budget <= 0 or self.theta < 1 or not 0 < self.sure < 1:
            raise InputError(
                "bad option", got=f"budget {self.budget}, theta {self.theta}, sure {self.sure}",
                expected="budget > 0, theta >= 1 and sure between 0 and 1",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    """A share of what a prompt's queries read: everything is held, and decode steps read it all."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    budget, leader = torch.full((context.geometry.layers,), options.budget), _leader(context, options)
    shape: dict[str, Any] = dict(block=options.block, sink=options.sink, local=options.local, dense=options.dense)
    if options.mode in V2:
        nearest = options.mode == "a-shape"
        shape |= V2[options.mode] | dict(unit=options.unit)
        shape |= dict(sink=max(options.sink, options.unit), local=max(options.local, options.unit)) if nearest else {}
        return _decided(Prefill(budget, **shape), {}, {})
    budget[:leader] = 1.0
    shape |= dict(summary="root-mean", leader=leader, window=options.window, apart=options.apart, most=options.most)
    if options.mode == "labels":
        return _decided(Prefill(budget, cut="labels", above=options.theta, **shape), {}, {})
    tables, losses, facts = _network(context, options, leader)
    above = float(torch.logit(torch.tensor(options.sure)))
    made = Prefill(budget, cut="predicted", above=above, tables=tables, **shape)
    return _decided(made, {"loss": losses}, facts | {"steps": len(losses)})


def _decided(prefill: Prefill, evidence: dict[str, torch.Tensor], facts: dict[str, Any]) -> Decision:
    return Decision(read=Read(torch.ones(len(prefill.budget)), unit=1, prefill=prefill), evidence=evidence, facts=facts)


def _leader(context: Context, options: Options) -> int:
    """The layer that makes boundaries: the first from `layer` on without a sliding window."""
    found = [layer for layer in _training.whole(context.geometry) if layer >= options.layer]
    if not found:
        raise InputError("no such layer has full attention", got=f"layer {options.layer}", expected="an earlier layer")
    return found[0]


def _network(
    context: Context, options: Options, leader: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, float]]:
    """The network's tables, losses fp32 [steps], and how it does on texts held out."""
    if options.weights:
        tables, losses = _boundaries.given(context, options, leader)
        return tables, losses, {}
    return _boundaries.train(context, options, leader)
