"""D2O: layers that look around keep more, and what leaves lives on in the kept entry that it resembles.

Wan et al., arXiv 2406.13035, ICLR 2025.

    F_l = mean over query heads of their min–max scaled variance of column sums;   ratio_l = softmax_l(−F)·L·ρ
    ρ = hh + recent, ratio_l within [0.01, 1];   layer l keeps the hh/ρ part of ratio_l·n by accumulated attention,
    the recent/ρ part for being the latest, and the first 4;   one entry leaves at every step
    m_e = max cosine of a dropped key with the kept ones;   e joins where the mean of m over heads reaches τ
    τ = mean(m) at first, then α·τ + β·mean(m);   x_u ← (x_u + Σ m_e x_e) / (1 + number of e)

    memory 2·b·d·K·Σ_l ratio_l·n, and all of layers 0, 1 and the last

Compared with the released code (AIoT-MLSys-Lab/D2O, commit 12c99d8). There, keys and scores are those of query heads,
with a copy of the cache for each; here a KV head keeps one set, by the mean over its group, while F still looks at
query heads. There, heads decide together about the n-th entry of each one's list, whichever token that is; so they do
here, over KV heads. There, the first entries leave when the first token is decoded, so that its query has scored; here
they leave when the prompt is in. The paper's exponential weights are from memory and not here: the released code has
them commented out. The mean shrinks where cosines are below 1, and a merged entry counts as one; `count` adds log n to
its logit, which is ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned
from kvtool.methods._frozen import frozen
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ()
MODEL = False
WHOLE = 2.0**30  # entries; at decode steps too


@dataclass(frozen=True)
class Options:
    """hh: share of the prompt's entries that stay by score, on average over layers. recent: share that stays for being
    the latest. mode: prompt, where the prompt's own attention deals the layers' shares, or calibrated, where texts have
    dealt them. whole: leave the first two layers and the last as they are, besides. sink: first entries that always
    stay. merge: average what leaves into what stays; else it is gone. alpha, beta: how the threshold moves. count: an
    entry that stands for n adds log n to its logit. samples, tokens: texts and their length that calibrated mode runs.
    """

    hh: float = 0.1
    recent: float = 0.1
    mode: Literal["prompt", "calibrated"] = "prompt"
    whole: bool = True
    sink: int = 4
    merge: bool = True
    alpha: float = 0.5
    beta: float = 0.5
    count: bool = False
    samples: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(0, self, "sink")
        at_least(1, self, "samples", "tokens")
        if not (self.hh >= 0 and self.recent >= 0 and 0 < self.hh + self.recent <= 1):
            raise InputError(
                "bad option hh or recent", got=f"{self.hh} and {self.recent}", expected="shares that sum to 1 at most"
            )


def at(budget: float) -> dict[str, Any]:
    return {"hh": budget / 2, "recent": budget / 2, "whole": False}


def calibrate(context: Context, options: Options) -> Decision:
    mean = options.hh + options.recent
    settings = {"newest": options.recent / mean, "alpha": options.alpha, "beta": options.beta}
    keep = thinned(
        context, mean, observe="all", reduce="sum", spread="density", pick="split", sink=options.sink, when="step",
        merge="moving" if options.merge else "drop", weigh="cosine", count=options.count, settings=settings,
    )  # fmt: skip
    if options.mode == "prompt" or mean == 1:
        return Decision(_spared(keep, options))
    fixed, shares = frozen(context, keep, samples=options.samples, tokens=options.tokens)
    assert fixed.select is not None
    select = dataclasses.replace(fixed.select, settings=settings)
    fixed = dataclasses.replace(fixed, select=select)
    return Decision(_spared(fixed, options), {"layer_ratio": shares[:, 0].contiguous()})


def _spared(keep: Keep, options: Options) -> Keep:
    """keep, but nothing leaves the layers that stay whole."""
    assert keep.select is not None
    budget, last = keep.select.budget.clone(), len(keep.select.budget) - 1
    if options.hh + options.recent == 1:
        budget[:] = WHOLE
    elif options.whole:
        budget[[0, min(1, last), last]] = WHOLE
    return dataclasses.replace(keep, select=dataclasses.replace(keep.select, budget=budget))
