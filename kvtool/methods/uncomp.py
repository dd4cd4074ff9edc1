"""UNComp: KV heads whose queries point in few directions keep less.

Xiong et al., arXiv 2410.03090.

    S: entropy of the spectrum of a head's queries (statistic `query-entropy`), mean over the query heads of a KV head
    in each layer the ⌈K/2⌉ KV heads that most texts rank high keep the large budget, the others low · B, the mean is B
    s_j = attention of the last w queries, maximum over `kernel` neighbours; the best stay, and the w newest
    at decode steps each head stays at its size, by the attention of the w newest queries;   memory 2·b·d·L·K·B

With low = 0.25 and B = 64 the budgets are 16 and 112, those of the released script at its smallest; at 512 it has 384
and 768 (low = 0.67), while its comment says otherwise. The paper ranks query heads and copies the cache to all of them;
here a KV head keeps one set.

Left out: dropping tokens from the hidden states between stages of layers while the prompt is read, which changes the
prompt's own states and whose stages are constants in the released code; and more groups than two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.methods._base import Context, Decision, odd, per_kv_head, share, thinned
from kvtool.options import at_least
from kvtool.statistics.query_entropy import upper

STATISTICS = ("query-entropy",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a KV head keeps in the mean, a share of the prompt when at most 1, else a count. low: budget
    of the heads of low entropy, a share of the mean. window: last queries that score, whose entries always stay.
    kernel: neighbours that are pooled. pool: max, mean or none. decode: evict at every step, or append."""

    budget: float = 0.25
    low: float = 0.25
    window: int = 8
    kernel: int = 7
    pool: Literal["max", "mean", "none"] = "max"
    decode: Literal["evict", "append"] = "evict"

    def __post_init__(self) -> None:
        at_least(1, self, "window")
        odd(self.kernel, "kernel")
        share(self.low, "low")


def at(budget: float) -> dict[str, Any]:
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    assert context.trace is not None
    seen, kv_heads = context.trace["query-entropy"], context.geometry.kv_heads
    texts = seen["sequences"].clamp_min(1)
    entropy = per_kv_head(seen["entropy"] / texts, kv_heads, "mean")
    votes = seen["high"] / texts + 1e-6 * entropy  # entropy decides between heads with as many votes
    high = torch.zeros(votes.shape, dtype=torch.bool)
    for layer, row in enumerate(votes):
        high[layer, upper(row)] = True
    small, large = caps(options.budget, options.low, int(high[0].sum()), kv_heads)
    keep = thinned(
        context, torch.where(high, large, small), observed=options.window, pool=options.pool, kernel=options.kernel,
        recent=options.window, minimum=options.window, history=options.window if options.decode == "evict" else 0,
        when="step" if options.decode == "evict" else "prefill", decay=0.0,
    )  # fmt: skip
    evidence = {"entropy": (seen["entropy"] / texts).float(), "high": (seen["high"] / texts).float()}
    return Decision(keep, evidence, {"small": small, "large": large})


def caps(budget: float, low: float, high: int, heads: int) -> tuple[float, float]:
    """(small, large) budgets of which `high` of so many heads keep the large one, `budget` in the mean; whole numbers
    if it is a count. A head cannot keep more than a whole prompt: what is over goes to the others."""
    if high == heads:
        return budget, budget
    small = low * budget if budget <= 1 else float(max(2, round(low * budget)))
    large = (heads * budget - (heads - high) * small) / high
    if budget <= 1 < large:
        return (heads * budget - high) / (heads - high), 1.0
    return small, large if budget <= 1 else float(int(large))
