"""PyramidKV: lower layers, which look around, keep more than upper ones, which have made up their mind.

Cai et al., arXiv 2406.02069.

    b = B − w;   low = ⌊b / β⌋;   high = 2b − low, at most n − w, and then low = 2b − high
    layer l keeps  high − l·⌊(high − low)/(L − 1)⌋  by SnapKV's score, and the window's w;   memory 2·b·d·K·Σ_l

The slope is the same for every model and prompt. Whole steps let the sum exceed L·B a little. `mode=code` makes the
budget flat where n < 2b, as the released code does; `mode=paper` clips the pyramid's foot instead. The released code
keeps a set for each query head; here each KV head has one.

`mode=calibrated` is ours and has no slope: budgets of layers are those that make Σ_l e_l(b_l) least at Σ_l b_l = L·B.
e_l(b) is the relative change of layer l's attention output when it alone keeps b entries, measured on prompts at the
`RUNGS` of B. So the slope, if a model has one, is found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.measuring.allocation import allocate
from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.methods._layers import errors, evened, spread, whole
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False
RUNGS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # of the mean budget


@dataclass(frozen=True)
class Options:
    """budget: entries a KV head keeps of the prompt on average, a share when at most 1, else a count. beta: how
    steep the pyramid is; 1 is none. window: last queries that score, whose entries always stay. kernel: neighbours
    that are pooled. pool: mean, max or none. mode: paper or code for the slope, or calibrated for budgets by the errors
    of layers. samples, tokens: prompts, text and passkeys, and their length that mode=calibrated measures. steps:
    tokens decoded after each."""

    budget: float = 0.25
    beta: int = 20
    window: int = 8
    kernel: int = 5
    pool: Literal["max", "mean", "none"] = "mean"
    mode: Literal["paper", "code", "calibrated"] = "paper"
    samples: int = 4
    tokens: int = 1024
    steps: int = 8

    def __post_init__(self) -> None:
        at_least(1, self, "window", "beta", "samples", "tokens", "steps")
        odd(self.kernel, "kernel")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    if options.mode != "calibrated":
        slope = {"beta": options.beta, "flat": options.mode == "code"}
        return Decision(_keep(context, options, options.budget, spread="slope", settings=slope))
    scale = options.tokens if options.budget <= 1 else 1
    entries = round(options.budget * scale)
    if entries >= options.tokens:
        return Decision(_keep(context, options, options.budget))
    ways = rungs(entries, options.window, options.tokens)
    keeps = [_keep(context, options, float(count)) for count in ways]
    each = errors(context, keeps, samples=options.samples, tokens=options.tokens, steps=options.steps)
    error = each.mean(0).T  # [L,P]
    layers = whole(context)
    counts = dealt(ways, error[layers], entries, options.window)
    budget = spread(context, counts, entries, scale)
    evidence = {"budgets": torch.tensor(ways), "error": error.float()}
    return Decision(_keep(context, options, budget), evidence, {"mean": sum(counts) / max(1, len(counts))})


def rungs(budget: int, window: int, tokens: int) -> list[int]:
    """Budgets to measure: at least one entry besides the window's, at most the prompt."""
    return sorted({min(tokens, max(window + 1, round(rung * budget))) for rung in RUNGS})


def dealt(ways: list[int], error: torch.Tensor, budget: int, floor: int) -> list[int]:
    """error fp64 [L,P] at so many entries → entries of each layer, `budget` in the mean. What is less than a step goes
    evenly to all."""
    size = torch.tensor(ways, dtype=torch.float64)
    if not len(error) or ways[0] >= budget:
        return [budget] * len(error)
    made = allocate([size] * len(error), list(error.double()), float(budget * len(error)))
    counts = [ways[way] for way in made.choice.tolist()]
    order = sorted(range(len(counts)), key=lambda layer: counts[layer])
    return evened(counts, budget * len(counts), order, min(floor, budget), max(ways))


def _keep(context: Context, options: Options, budget: float | torch.Tensor, **dealing: Any) -> Keep:
    return thinned(
        context, budget, observed=options.window, pool=options.pool, kernel=options.kernel, recent=options.window,
        **dealing,
    )  # fmt: skip
