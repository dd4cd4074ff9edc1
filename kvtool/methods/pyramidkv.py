"""PyramidKV: lower layers, which look around, keep more than upper ones, which have made up their mind.

Cai et al., arXiv 2406.02069.

    b = B − w;   low = ⌊b / β⌋;   high = 2b − low, at most n − w, and then low = 2b − high
    layer l keeps  high − l·⌊(high − low)/(L − 1)⌋  by SnapKV's score, and the window's w;   memory 2·b·d·K·Σ_l

The slope is the same for every model and prompt. Whole steps let the sum exceed L·B a little. `mode=code` makes the
budget flat where n < 2b, as the released code does; `mode=paper` clips the pyramid's foot instead. The released code
keeps a set for each query head; here each KV head has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.methods._base import Context, Decision, odd, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries a KV head keeps of the prompt on average, a share when at most 1, else a count. beta: how
    steep the pyramid is; 1 is none. window: last queries that score, whose entries always stay. kernel: neighbours
    that are pooled. pool: mean, max or none. mode: paper or code."""

    budget: float = 0.25
    beta: int = 20
    window: int = 8
    kernel: int = 5
    pool: Literal["max", "mean", "none"] = "mean"
    mode: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        at_least(1, self, "window", "beta")
        odd(self.kernel, "kernel")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, observed=options.window, pool=options.pool, kernel=options.kernel,
        recent=options.window, spread="slope", settings={"beta": options.beta, "flat": options.mode == "code"},
    )  # fmt: skip
    return Decision(keep)
