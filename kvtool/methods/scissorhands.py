"""Scissorhands: what was important stays important; what keeps falling below the uniform share of attention goes.

Liu et al., arXiv 2305.17118, NeurIPS 2023. No released code was found: reconstructed from memory of the paper.

    I_j = how many of the last `history` queries i paid entry j less than 1/t_i,   t_i entries seen by i
    when the cache holds more than B entries: keep the last `recent`, and drop those of the others with the largest I,
    a share `drop` of B at once;   memory between 2·b·d·L·K·(1 − drop)·B and 2·b·d·L·K·B

The counts are taken when entries go, from the remembered queries over the entries then held, instead of being kept
step by step: an entry that was never dropped has the same count but for queries that saw others which are gone by now.
The uniform share counts live entries, not positions. Every KV head decides by the mean over its group. The paper's
layer budgets from persistence are not included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, thinned
from kvtool.options import at_least

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries a KV head holds at most, a share of the prompt when at most 1, else a count. history: last
    queries that count. recent: latest entries that always stay, at least `history`. drop: share of the budget that
    goes at once."""

    budget: float = 0.5
    history: int = 8
    recent: int = 32
    drop: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, self, "history", "recent")
        if not 0 < self.drop < 1:
            raise InputError("bad option drop", got=self.drop, expected="a share between 0 and 1")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    keep = thinned(
        context, options.budget, score="above-average", reduce="sum", observed=options.history, history=options.history,
        recent=options.recent, when="step", decay=0.0, slack=options.drop,
    )  # fmt: skip
    return Decision(keep)
