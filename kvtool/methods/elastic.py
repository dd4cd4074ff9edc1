"""Elastic Cache: a prompt's best entries are anchors that take their neighbours in; later, a fixed place empties.

Liu et al., arXiv 2407.18121, ECCV 2024.

    s_j = Σ_i of the mean over all heads of A[i, j]: one score, and one set, for all heads of a layer
    prompt   sinks, the last entry and the best others stay; each other key and value is averaged, equally, into the
             kept entry at the nearest place
    steps    whenever the budget is exceeded, what stands `distance` places before the newest entry goes

    memory 2·b·d·L·K·budget·t

Compared with the released code (liuzuyan/ElasticCache, commit 3138e03). It reads argsort's output as ranks, so that
what it keeps are not the best, and keeps one entry fewer than meant; and it forgets the sinks when it says where the
dropped entries stand, so that others are averaged in. mode "code" does all that; "paper" keeps the best and averages
what leaves. Sinks and the last entry take nothing in, as there. There, the place that empties has a fixed number; here,
a fixed distance to the newest entry, which is the same while the cache does not grow. Keys are averaged as rotated: of
two copies δ apart, the channels of angular frequency f shrink by cos(f·δ/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: share of all tokens so far that every KV head keeps. sink: first entries that always stay. distance:
    places before the newest entry where decode steps take one out. merge: average what leaves a prompt into what stays;
    else it is gone. mode: paper, or code for the entries that the released code keeps and averages."""

    budget: float = 0.2
    sink: int = 4
    distance: int = 25
    merge: bool = True
    mode: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        at_least(0, self, "sink")
        at_least(1, self, "distance")
        if not 0 < self.budget <= 1:
            raise InputError("bad option budget", got=self.budget, expected="a share above 0, up to 1")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    code = options.mode == "code"
    settings = {"distance": options.distance, "shift": options.sink if code else 0}
    keep = thinned(
        context, options.budget, observe="all", reduce="sum", alike=True, sink=options.sink, recent=1, when="step",
        growing=True, pick="permuted" if code else "distance", merge="anchored" if options.merge else "drop",
        settings=settings,
    )  # fmt: skip
    return Decision(keep)
