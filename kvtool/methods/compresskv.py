"""CompressKV: a few heads of each layer, which look at whole answers, choose for all; layers that err most keep more.

Lin et al., arXiv 2508.02401.

    head score   attention to the whole needle in the steps that copy it (statistic `retrieval`, its `mass`); the best
                 `heads` query heads of a layer vote
    s_j = attention of the last w queries, mean over `kernel` neighbours, over the voting heads; all KV heads of the
    layer keep the same entries, the best of them and the w last
    layer score  e_l: change of the layer's attention output when it keeps `probe` entries, relative to it, 1 in sum
    b_l = f + [e_l · (B·L − f·L)], at least f, at most 3B, then by ones to B·L in sum;   memory 2·b·d·K·Σ_l b_l

Decoded entries are all kept. A budget that is a share is turned into entries at the length of the prompts, `tokens`, on
which e_l is measured, and back. `layers=equal` leaves the heads' choice alone, `heads=0` lets all heads vote; so do
models that answer none of the prompts, since they show no such heads.

Departures from the released code: e_l is measured on texts and passkeys in place of LongBench, with the true tokens fed
back, and normalised per prompt, not per data set. Its ranking counts a step once for each place of the needle that
holds the generated token, ours once. Two voting heads may share a KV head, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool import sensitivity
from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.methods._prompts import prompts
from kvtool.options import at_least
from kvtool.plan import Plan
from kvtool.slots import Keep

STATISTICS = ("retrieval",)
MODEL = True


@dataclass(frozen=True)
class Options:
    """budget: entries that a layer's heads keep of the prompt in the mean, a share when at most 1, else a count. heads:
    query heads of a layer that vote; 0 is all. window: last queries that score, whose entries always stay. kernel:
    neighbours that are pooled. pool: mean, max or none. layers: budgets by error, or equal ones. floor: entries that
    every layer keeps. probe: entries that are kept where errors are measured. samples, tokens: prompts, text and
    passkeys, and their length that errors are measured on. steps: tokens decoded after each."""

    budget: float = 0.25
    heads: int = 4
    window: int = 8
    kernel: int = 5
    pool: Literal["max", "mean", "none"] = "mean"
    layers: Literal["error", "equal"] = "error"
    floor: int = 32
    probe: int = 32
    samples: int = 6
    tokens: int = 1024
    steps: int = 8

    def __post_init__(self) -> None:
        at_least(1, self, "window", "samples", "tokens", "steps", "floor")
        at_least(2, self, "probe")
        at_least(0, self, "heads")
        odd(self.kernel, "kernel")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    assert context.trace is not None
    seen = context.trace["retrieval"]
    counted = int(seen["counted"])
    mass = (seen["mass"] / max(1, counted)).float()
    votes = voting(mass, options.heads if counted else 0)
    evidence, facts = {"mass": mass}, {"answered": counted, "voting": int(votes[0].sum())}
    keep = _keep(context, options, votes, options.budget)
    if options.layers == "equal" or (keep.select is not None and keep.select.lossless):
        return Decision(keep, evidence, facts)
    error = _errors(context, options, votes)
    scale = options.tokens if options.budget <= 1 else 1
    budget, cap = round(options.budget * scale), options.tokens if options.budget <= 1 else 1 << 31
    shares = torch.tensor(allotted(error.tolist(), budget, floor=options.floor, cap=cap)).float() / scale
    keep = _keep(context, options, votes, shares[:, None].repeat(1, context.geometry.kv_heads))
    return Decision(keep, {**evidence, "error": error.float()}, facts)


def voting(mass: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores [L,H] → fp32 [L,H]: 1 for the best `heads` of each layer, ties to the first; all of them if 0."""
    order = torch.argsort(mass, dim=1, descending=True, stable=True)[:, : heads or mass.shape[1]]
    return torch.zeros(mass.shape).scatter_(1, order, 1.0)


def _keep(context: Context, options: Options, votes: torch.Tensor, budget: float | torch.Tensor) -> Keep:
    return thinned(
        context, budget, observed=options.window, pool=options.pool, kernel=options.kernel, weights=votes, alike=True,
        recent=options.window,
    )  # fmt: skip


def _errors(context: Context, options: Options, votes: torch.Tensor) -> torch.Tensor:
    """fp64 [L], 1 in sum: the mean over prompts of each one's errors, which are 1 in sum."""
    assert context.model is not None
    plan = Plan("probe", context.model.fingerprint, keep=_keep(context, options, votes, float(options.probe)))
    samples = prompts(context, samples=options.samples, tokens=options.tokens, steps=options.steps)
    each = sensitivity.errors(context.model, plan, samples, context.progress)
    total = each.sum(1, keepdim=True)
    return torch.where(total > 0, each / total.clamp_min(1e-30), 1 / each.shape[1]).mean(0)


def allotted(error: list[float], budget: int, *, floor: int, cap: int) -> list[int]:
    """Entries of each layer, by errors that are 1 in sum: `budget` in the mean, at least `floor` and at most three
    times the budget, or the cap. What rounding and clipping leave is dealt out one by one: given to the layers that
    err most, or taken from those that err least."""
    layers, floor, cap = len(error), min(floor, budget), max(budget, min(3 * budget, cap))
    spare = (budget - floor) * layers
    counts = [min(cap, floor + round(score * spare)) for score in error]
    order = sorted(range(layers), key=lambda layer: -error[layer])
    while (missing := budget * layers - sum(counts)) > 0:
        for layer in [layer for layer in order if counts[layer] < cap][:missing]:
            counts[layer] += 1
    while (over := sum(counts) - budget * layers) > 0:
        for layer in [layer for layer in reversed(order) if counts[layer] > floor][:over]:
            counts[layer] -= 1
    return counts
