"""RetroInfer: clusters of keys are an index; the best are read, the next are estimated, the rest is left out.

Chen et al., arXiv 2505.02922.

    once the prompt is in: spherical k-means on the centred keys of each KV head, a cluster for `unit` entries
    c, v̄, n of each cluster: mean key, mean value, size;   p = Σ_g softmax_c(scale · q_g · c) over a group's heads
    the best clusters by p are read exactly, `budget` of the entries
    the next `estimated` of the clusters take part with weight n · exp(scale · q · c) and value v̄, in one softmax

exp is convex, so that an estimate never exceeds what the cluster's entries weigh together, and is exact where their
keys are equal. Entries live in host memory (`slow`), but for sinks and recent ones; what is decoded is clustered as
soon as `unit` entries have left the window.

Where we depart from the released code (microsoft/RetrievalAttention, 6b1228c; card C3b): a budget is of entries, and
the last cluster is cut where it ends; of a cluster that is read in part, the rest is estimated. k-means normalises no
centroid, since only its direction matters, and segments of a prompt of 8,192 entries begin anew as there. What is
decoded joins in blocks of `unit`, not of 1,024: `recent` holds it back. Nothing is kept of the blocks fetched last
(its cache of 5% of the clusters saves moves, not reads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ()
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a step reads, a share of all when at most 1, else a count. estimated: share of the clusters
    that are estimated. unit: entries of a cluster, on average. dense: first layers that read everything. sink, recent:
    entries that are always read. slow: the others live in host memory."""

    budget: float = 0.018
    estimated: float = 0.232
    unit: int = 16
    dense: int = 0
    sink: int = 4
    recent: int = 64
    slow: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "unit")
        at_least(0, self, "dense", "sink", "recent")
        share(self.estimated, "estimated")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    budget = torch.full((context.geometry.layers,), options.budget)
    budget[: options.dense] = 1.0
    read = Read(
        budget, unit=options.unit, form="cluster", summary="mean", heads="sum", softmax=True, sink=options.sink,
        recent=options.recent, slow=options.slow, estimated=options.estimated,
        tail="estimate" if options.estimated else "drop",
    )  # fmt: skip
    return Decision(read=read)
