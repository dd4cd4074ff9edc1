"""KVMerger: consecutive entries with similar keys become one, around the one that is looked at most.

Wang et al., arXiv 2407.08454. Reconstructed in part: no code was released; runs, pivots and Gaussian weights are the
paper's as others retell them, the width of the Gaussian and what else stays as it is are readings.

    neighbours i, i + 1 stand in one run if cos(k_i, k_{i+1}) > ε; heavy hitters, sinks and recent entries stand alone
    pivot p = the run's highest accumulated attention;   g_i = exp(−‖k_p − k_i‖² / 2σ²), g_p = 1
    k̂ = Σ g_i k_i / Σ g,   v̂ = Σ g_i v_i / Σ g,   at the pivot's place;   memory 2·b·d·Σ runs, and what is decoded

σ is circular as published (it is made from the g that it makes); here it is the mean distance of the run's others from
the pivot, where one of the unofficial implementations starts its iteration. Equal keys have σ = 0 and equal weights.
Keys are compared as rotated. mode "prompt" takes the ε of each head that meets the budget exactly. "calibrated" freezes
the mean ε that texts needed, per layer or per KV head: then a prompt with more alike neighbours keeps fewer entries,
and one with fewer is held to the budget. `count` adds log n to the logit of an entry that stands for n, which keeps the
mass of equal keys exactly; multiplying values by n, as one reading has it, does not. The published method merges again
while it decodes; here the prompt is thinned once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.cache.keep.runs import links, needed, sole
from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.selector import Selector
from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.methods._filled import filled, selecting
from kvtool.methods._prompts import texts
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: share of the prompt's entries that every KV head keeps, at most. heavy: share of these that stand alone
    for their accumulated attention. sink, recent: first and last entries that stand alone. mode: prompt, where every
    prompt's own keys set the threshold, or calibrated, where texts have set it. level: one threshold per layer, or per
    head. merge: average runs; else only their pivots stay. count: an entry that stands for n adds log n to its logit.
    whole: leave the first two layers and the last as they are, besides. samples, tokens: texts and their length that
    calibrated mode runs."""

    budget: float = 0.5
    heavy: float = 0.1
    sink: int = 4
    recent: int = 32
    mode: Literal["prompt", "calibrated"] = "prompt"
    level: Literal["layer", "head"] = "layer"
    merge: bool = True
    count: bool = False
    whole: bool = False
    samples: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(0, self, "sink", "recent")
        at_least(1, self, "samples", "tokens")
        share(self.heavy, "heavy")
        if not 0 < self.budget <= 1:
            raise InputError("bad option budget", got=self.budget, expected="a share above 0, up to 1")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    budget = torch.full((g.layers, g.kv_heads), options.budget)
    if options.whole:
        budget[[0, min(1, g.layers - 1), g.layers - 1]] = 1.0
    keep = thinned(
        context, budget, observe="all", reduce="sum", sink=options.sink, recent=options.recent, pick="runs",
        merge="runs" if options.merge else "drop", weigh="gaussian", count=options.count,
        settings={"heavy": options.heavy},
    )  # fmt: skip
    if options.mode == "prompt" or options.budget == 1:
        return Decision(keep)
    epsilon = thresholds(context, keep, options.samples, options.tokens)
    if options.level == "layer":
        epsilon = epsilon.mean(1, keepdim=True).expand_as(epsilon).contiguous()
    assert keep.select is not None
    select = dataclasses.replace(keep.select, pick="similar-runs", tables={"epsilon": epsilon})
    return Decision(dataclasses.replace(keep, select=select), {"epsilon": epsilon})


def thresholds(context: Context, keep: Keep, samples: int, tokens: int) -> torch.Tensor:
    """fp32 [L,K]: the ε that meets the budget, on average over texts; 1, which joins nothing, where all is kept."""
    read = texts(context, samples=samples, tokens=tokens)
    total = torch.zeros(context.geometry.layers, context.geometry.kv_heads)
    for cache in filled(context, keep, read, "thresholds"):
        found = torch.ones_like(total)
        for layer, selector, view in selecting(cache):
            found[layer, selector.heads] = _needed(selector, view)
        total += found
    return total / len(read)


def _needed(selector: Selector, view: View) -> torch.Tensor:
    """ε of each of the selector's heads."""
    entries = view.k.shape[2]
    count = selector.limits(entries)[0]
    heavy = float(selector.spec.settings["heavy"])
    alone = sole(selector.scores(view), count, selector.free(entries), heavy)
    return needed(links(view.k, alone), count)[0].cpu()
