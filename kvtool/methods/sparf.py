"""SparF: few channels of the query tell which entries to read; what is not read is the mean value (InstInfer).

Pan et al., arXiv 2409.04992 (InstAttention, HPCA 2025); the two steps are SparQ's, arXiv 2312.04985.

    C = the `channels` of a query head with the largest |q_c|;   τ = √(Σ_C |q_c| / Σ_c |q_c|)
    ŝ = softmax(scale · Σ_C q_c · k_c / τ);   T = the entries with the largest ŝ;   α = Σ_T ŝ
    out = α · softmax(scale · q · k over T) V + (1 − α) · v̄,   v̄: the mean of all values

Entries come from flash memory in pages: of `page` entries one that is chosen brings all, and bytes are counted so,
though attention sees the chosen ones alone. Keys are read twice, a few channels of all and all channels of a few, for
which the paper stores them twice.

Where we depart from the paper (card C10; its code was not available): α shares out the mass of the bulk only, since
sinks and recent entries have exact logits, where the paper biases the scores of recent ones; v̄ is of the bulk for the
same reason. A page is read if any of its entries is chosen: the printed algorithm says the opposite, which cannot be
meant. `heads=each` is the paper's; a reduction lets the query heads of a KV head read one set. Keys are held once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a query head reads, a share of all when at most 1, else a count. channels: of the query that
    choose, a share of all when at most 1, else a count. tail: what is not read is the mean value, or dropped. heads:
    each query head chooses, or how those of a KV head agree. page: entries that memory hands out at once, for the count
    of bytes. dense: first layers that read everything. sink, recent: entries that are always read."""

    budget: float = 0.125
    channels: float = 0.25
    tail: Literal["mean", "drop"] = "mean"
    heads: Literal["each", "max", "mean", "sum"] = "each"
    page: int = 16
    dense: int = 0
    sink: int = 0
    recent: int = 16

    def __post_init__(self) -> None:
        at_least(1, self, "page")
        at_least(0, self, "dense", "sink", "recent")
        for name in ("budget", "channels"):
            if getattr(self, name) <= 0:
                raise InputError(f"bad option {name}", got=getattr(self, name), expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    g = context.geometry
    channels = options.channels * g.head_dim if options.channels <= 1 else options.channels
    if channels > g.head_dim:
        raise InputError("more channels than there are", got=round(channels), expected=f"at most {g.head_dim}")
    budget = torch.full((g.layers,), options.budget)
    budget[: options.dense] = 1.0
    read = Read(
        budget, unit=1, summary="keys", rank=max(1, round(channels)), heads=options.heads, tail=options.tail,
        page=options.page, sink=options.sink, recent=options.recent,
    )  # fmt: skip
    return Decision(read=read)
