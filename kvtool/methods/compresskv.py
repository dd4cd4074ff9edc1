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

from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.methods._layers import by_score, errors
from kvtool.options import at_least
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
    seen = context.seen["retrieval"]
    counted = int(seen["counted"])
    mass = (seen["mass"] / max(1, counted)).float()
    votes = voting(mass, options.heads if counted else 0)
    evidence, facts = {"mass": mass}, {"answered": counted, "voting": int(votes[0].sum())}
    keep = _keep(context, options, votes, options.budget)
    if options.layers == "equal" or (keep.select is not None and keep.select.lossless):
        return Decision(keep, evidence, facts)
    probe = _keep(context, options, votes, float(options.probe))
    each = errors(context, [probe], samples=options.samples, tokens=options.tokens, steps=options.steps)[:, 0]
    total = each.sum(1, keepdim=True)
    error = torch.where(total > 0, each / total.clamp_min(1e-30), 1 / each.shape[1]).mean(0)
    budget = by_score(context, error, options.budget, floor=options.floor, tokens=options.tokens)
    return Decision(_keep(context, options, votes, budget), {**evidence, "error": error.float()}, facts)


def voting(mass: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores [L,H] → fp32 [L,H]: 1 for the best `heads` of each layer, ties to the first; all of them if 0."""
    order = torch.argsort(mass, dim=1, descending=True, stable=True)[:, : heads or mass.shape[1]]
    return torch.zeros(mass.shape).scatter_(1, order, 1.0)


def _keep(context: Context, options: Options, votes: torch.Tensor, budget: float | torch.Tensor) -> Keep:
    return thinned(
        context, budget, observed=options.window, pool=options.pool, kernel=options.kernel, weights=votes, alike=True,
        recent=options.window,
    )  # fmt: skip
