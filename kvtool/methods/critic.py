"""CRITIC: entries stay by how much they are looked at, how widely they looked, and how they move the output.

Sharma et al., arXiv 2504.01281 (the PORAG and ATLAS paper). Partly reconstructed: the text was read, no code was found.

    s = w_a·minmax(attention received) + w_e·minmax(entropy of the entry's own row) + w_g·minmax(‖∂ℓ/∂k‖₁ + ‖∂ℓ/∂v‖₁)
    ℓ = mean square of the difference between a layer's attention outputs now and a step before
    r = min(ratio + alpha·pressure, most);   keep max(minimum, (1 − r)·n) entries of every layer, the same in all heads

Memory 2·b·d·K·L·max(minimum, (1 − r)·n). Where the printed text cannot be meant, ours is: attention received sums over
queries (as printed, over keys, it is 1 for every row); an entropy is divided by the logarithm of how many entries the
row sees; the size is settled once, where shrinking by 1 − r at every token would leave `minimum` entries soon. An
entry's entropy is known only from the call that fed it, and counts as old score afterwards (`decay`); that of a decode
step, one number between 0 and 1, is not scaled. At the prompt's end ℓ is of its last two queries; the first decode step
has no output before it. The weights are not published. Gradients are in closed form, and a decode step is one operation
(see `cache/keep/scores/hybrid.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """ratio: share that goes when memory is free. alpha, pressure, most: `pressure` is the share of memory in use,
    and adds alpha times itself to the ratio, up to `most`. minimum: entries below which nothing goes. attention,
    entropy, gradient: weights, summing to 1. decay: weight of old scores at every step. position: original, or
    reindex for positions inside the cache, which the paper's "synchronised" positions may mean."""

    ratio: float = 0.5
    alpha: float = 0.2
    pressure: float = 0.0
    most: float = 0.9
    minimum: int = 64
    attention: float = 0.6
    entropy: float = 0.2
    gradient: float = 0.2
    decay: float = 0.9
    position: Literal["original", "reindex"] = "original"

    def __post_init__(self) -> None:
        at_least(1, self, "minimum")
        for name in ("ratio", "pressure", "most", "attention", "entropy", "gradient", "decay"):
            share(getattr(self, name), name)
        if abs(self.attention + self.entropy + self.gradient - 1) > 1e-6 or self.ratio > self.most:
            raise InputError(
                "bad weights or ratio", got=f"{self.attention} + {self.entropy} + {self.gradient}, {self.ratio}",
                expected="weights that sum to 1, and ratio <= most",
            )  # fmt: skip


def at(budget: float) -> dict[str, Any]:
    return {"ratio": 1 - budget, "most": 1.0, "minimum": 1}


def calibrate(context: Context, options: Options) -> Decision:
    ratio = min(options.ratio + options.alpha * options.pressure, options.most)
    keep = thinned(
        context, 1 - ratio, observe="all", score="hybrid", alike=True, minimum=options.minimum, when="step",
        decay=options.decay, position=options.position,
        settings={name: getattr(options, name) for name in ("attention", "entropy", "gradient")},
    )  # fmt: skip
    return Decision(keep, facts={"ratio": ratio})
