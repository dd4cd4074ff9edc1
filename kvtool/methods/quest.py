"""Quest: read only the pages that could hold the largest attention for this query.

Tang et al., arXiv 2406.10774, ICML 2024.

    each page of P entries keeps its channel-wise minimum m and maximum M;  bound(q, page) = Σ_c max(q_c·m_c, q_c·M_c)
    a decode step reads the pages with the largest bounds, and sinks and recent entries besides

Everything is held: the cache shrinks not at all, and grows by 2/P for the summaries; what falls is bytes read. The
paper leaves the first two layers dense: `dense` layers read everything.

Where we depart from the released code (mit-han-lab/Quest, 01c1623; card C4): there each query head reads pages of its
own, hence up to G times as many; here the heads of a group agree on one choice, by their best bound, unless
`heads=each`. It reads three pages at least, here one is enough. Recent entries are always read, where its kernels
always read the page that is being filled, and its PyTorch path lets that one compete.
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
    """budget: entries that a step reads, a share of the pages when at most 1, else a count. page: entries of a page.
    heads: how the query heads of a KV head agree, or each reads its own. dense: first layers that read everything.
    sink, recent: entries that are always read."""

    budget: float = 0.1
    page: int = 16
    heads: Literal["max", "mean", "sum", "each"] = "max"
    dense: int = 2
    sink: int = 0
    recent: int = 16

    def __post_init__(self) -> None:
        at_least(1, self, "page")
        at_least(0, self, "dense", "sink", "recent")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    budget = torch.full((context.geometry.layers,), options.budget)
    budget[: options.dense] = 1.0
    read = Read(
        budget, unit=options.page, summary="minmax", heads=options.heads, sink=options.sink, recent=options.recent
    )
    return Decision(read=read)
