"""Ada-KV: the heads of a layer compete for its budget, so that a head whose attention is spread out keeps more.

Feng et al., arXiv 2407.11550, NeurIPS 2025.

    s = SnapKV's scores, averaged over the group before they are pooled
    c_h = how many of head h's entries are among the best K·(B − w) of the layer
    head h keeps  [c_h (1 − α)] + ⌊α (B − w)⌋  and the window's w;   memory 2·b·d·L·Σ_h ≈ 2·b·d·L·K·B

α is `floor`: what every head keeps of its own budget, however its scores compare. [] rounds half to even, as the
released code does, so a layer's sum may miss K·B by a few. The released code counts query heads unless told otherwise;
here the rivals are KV heads. `mode=calibrated` runs the above on `samples` texts and freezes each head's mean share, so
that a batch stays rectangular and budgets are known before a prompt is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.methods._base import Context, Decision, odd, share, thinned
from kvtool.methods._frozen import frozen
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries a KV head keeps of the prompt on average, a share when at most 1, else a count. floor: share
    α of its own budget that each head is sure of. window: last queries that score, whose entries always stay.
    kernel: neighbours that are pooled. pool: max, mean or none. group: how the query heads of a KV head become one,
    mean or max. mode: prompt, or calibrated for shares frozen beforehand. samples, tokens: texts and their length
    that mode=calibrated measures."""

    budget: float = 0.25
    floor: float = 0.2
    window: int = 32
    kernel: int = 7
    pool: Literal["max", "mean", "none"] = "max"
    group: Literal["mean", "max"] = "mean"
    mode: Literal["prompt", "calibrated"] = "prompt"
    samples: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(1, self, "window", "samples", "tokens")
        odd(self.kernel, "kernel")
        share(self.floor, "floor")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, observed=options.window, pool=options.pool, kernel=options.kernel, group=options.group,
        group_first=True, recent=options.window, spread="layer", floor=options.floor,
    )  # fmt: skip
    if options.mode == "prompt":
        return Decision(keep)
    keep, shares = frozen(context, keep, samples=options.samples, tokens=options.tokens)
    return Decision(keep, {"share": shares})
