"""KVCrush: most of the budget goes to SnapKV's best entries, the rest to entries that stand for the many left out.

Jha et al., arXiv 2503.00022.

    bit_h(j) = 1 if entry j is in the upper half of head h's scores, h = 1 … K;   d_j = Hamming(bits(j), anchor)
    the share `representatives` of what may be chosen comes from the entries left, evenly spaced along their order by d

Memory 2·b·d·L·K·B as for the scorer; signatures do not outlive the choice. Bits come from KV heads, of the layer's
heads that share a lane. The card's page form (bits per page, as the released code for two engines has it) is not
included. Equal distances are common, K being small: entries then stand in order of position, so that spacing spreads
them over the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.methods._base import Context, Decision, odd, share, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries each KV head keeps of the prompt, a share when at most 1, else a count. representatives:
    share of the budget for entries that stand for others. anchor: the signature that distances are taken from:
    alternate, zeros, ones, random or mean. spacing: linspace (both ends of the order) or step (the first of each
    stretch). window, kernel, pool: as for SnapKV."""

    budget: float = 0.25
    representatives: float = 0.25
    anchor: Literal["alternate", "zeros", "ones", "random", "mean"] = "alternate"
    spacing: Literal["linspace", "step"] = "linspace"
    window: int = 16
    kernel: int = 5
    pool: Literal["max", "mean", "none"] = "max"

    def __post_init__(self) -> None:
        at_least(1, self, "window")
        odd(self.kernel, "kernel")
        share(self.representatives, "representatives")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, observed=options.window, pool=options.pool, kernel=options.kernel,
        recent=options.window, pick="representatives", seed=context.seed,
        settings={"share": options.representatives, "anchor": options.anchor, "spacing": options.spacing},
    )  # fmt: skip
    return Decision(keep)
