"""Scissorhands: what was important stays important; what keeps falling below the uniform share of attention goes.

Liu et al., arXiv 2305.17118, NeurIPS 2023. No released code was found: reconstructed from memory of the paper.

    I_j = how many of the last `history` queries i paid entry j less than 1/t_i,   t_i entries seen by i
    when the cache holds more than B entries: keep the last `recent`, and drop those of the others with the largest I,
    a share `drop` of B at once;   memory between 2·b·d·L·K·(1 − drop)·B and 2·b·d·L·K·B

The counts are taken when entries go, from the remembered queries over the entries then held, instead of being kept
step by step: an entry that was never dropped has the same count but for queries that saw others which are gone by now.
The uniform share counts live entries, not positions. Every KV head decides by the mean over its group.

`mode=calibrated` gives layers budgets by the persistence ratio of importance (statistic `persistence`): the paper finds
it above 95 % in most layers and lower in the last ones, which therefore keep more. How much more is ours:

    b_l = f·B + (1 − f)·L·B · (1 − p_l) / Σ (1 − p),   at most 3 B;   p_l over the layer's query heads and all texts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share, thinned
from kvtool.methods._layers import by_score
from kvtool.options import at_least
from kvtool.slots import Keep

STATISTICS = ("persistence",)
MODEL = False
UNITS = 1024  # parts of a prompt that budgets are counted in, if they are shares


@dataclass(frozen=True)
class Options:
    """budget: entries a KV head holds at most, a share of the prompt when at most 1, else a count. history: last
    queries that count. recent: latest entries that always stay, at least `history`. drop: share of the budget that
    goes at once. mode: prompt for one budget for all layers, or calibrated for budgets by persistence. floor: share of
    the budget that mode=calibrated leaves every layer."""

    budget: float = 0.5
    history: int = 8
    recent: int = 32
    drop: float = 0.5
    mode: Literal["prompt", "calibrated"] = "prompt"
    floor: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, self, "history", "recent")
        if not 0 < self.drop < 1:
            raise InputError("bad option drop", got=self.drop, expected="a share between 0 and 1")
        share(self.floor, "floor")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.mode == "calibrated" else ()


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    if options.mode == "prompt":
        return Decision(_keep(context, options, options.budget))
    persistence = ratio(context.seen["persistence"])
    floor = options.floor * options.budget * (UNITS if options.budget <= 1 else 1)
    budget = by_score(context, 1 - persistence, options.budget, floor=floor, tokens=UNITS)
    return Decision(_keep(context, options, budget), {"persistence": persistence.float()})


def ratio(seen: Any) -> torch.Tensor:
    """fp64 [L]: the share of the entries that were important after half a text which had been before; 1 where none."""
    both, after = (seen[name].sum(1) for name in ("both", "after"))
    return torch.where(after > 0, both / after.clamp_min(1), 1.0)


def _keep(context: Context, options: Options, budget: float | torch.Tensor) -> Keep:
    return thinned(
        context, budget, score="above-average", reduce="sum", observed=options.history, history=options.history,
        recent=options.recent, when="step", decay=0.0, slack=options.drop,
    )  # fmt: skip
