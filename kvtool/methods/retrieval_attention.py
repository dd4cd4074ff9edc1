"""RetrievalAttention: the keys of a prompt are a vector index, and each query head attends to the best it finds there.

Liu et al., arXiv 2409.10516, NeurIPS 2025.

    W: the first `sink` and last `recent` entries, always read;   Ω: the `budget` best of the others by q · k, as found
    out = attention over W merged with attention over Ω by their log-sum-exps; what is in neither is left out
    index=graph: keys that queries of the prompt are nearest to at once are neighbours (`cache/read/indexes/graph.py`)
    index=cluster: k-means, the best clusters are scanned;   index=flat: every key is scanned

Queries do not lie where keys do, so an index that is built from keys alone leads a query astray. How far off they lie
is the evidence `outside` [L,H], of the trace: their Mahalanobis distance in units of the keys' own, which is √D, with
μ and Σ the mean and covariance of a KV head's keys.

    outside = √(mean over a query head's queries of (q − μ)ᵀ Σ⁻¹ (q − μ) / D);   1 for queries that lie as keys do

Per query head the index is its own, as in the paper; keys are held once. The paper finds neighbours of all the prompt's
queries, which costs t² D: here of `queries` of them. It gives no settings of the graph; ours are taken from what is
known of others' examples and tried (card C3: 100 nearest, degree 35, list 500). No code of the graph was found: its
projection is written from the description. The paper moves tokens between W and Ω by a predictor; its evaluation has
the fixed pattern, and so have we: what leaves the window after the prompt is scanned, not linked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ("moments",)
MODEL = False
RIDGE = 1e-6  # of a covariance's mean eigenvalue: directions that no key takes


@dataclass(frozen=True)
class Options:
    """budget: entries that a query head reads of the index, a share of all when at most 1, else a count. index: graph,
    cluster or flat. queries: of a prompt that the graph is built from, at most. nearest: keys that each of them links.
    degree: neighbours of a key, at most. ef: keys that a search goes on from, and finds, at least. wide: keys whose
    neighbours are looked at together. entries: of a cluster, on average. scan: share of all entries that the clusters
    hold which are looked at. dense: first layers that read everything. sink, recent: entries that are always read.
    slow: the others live in host memory, and are searched there. evidence: measure how far from keys queries lie."""

    budget: float = 100
    index: Literal["graph", "cluster", "flat"] = "graph"
    queries: int = 512
    nearest: int = 32
    degree: int = 32
    ef: int = 128
    wide: int = 8
    entries: int = 16
    scan: float = 0.1
    dense: int = 0
    sink: int = 128
    recent: int = 512
    slow: bool = True
    evidence: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "queries", "degree", "ef", "wide", "entries")
        at_least(2, self, "nearest")
        at_least(0, self, "dense", "sink", "recent")
        share(self.scan, "scan")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def reads(options: Options) -> tuple[str, ...]:
    return STATISTICS if options.evidence else ()


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    budget = torch.full((context.geometry.layers,), options.budget)
    budget[: options.dense] = 1.0
    names = {"graph": ("queries", "nearest", "degree", "ef", "wide"), "cluster": ("entries", "scan")}
    read = Read(
        budget, unit=1, summary="keys", heads="each", index=None if options.index == "flat" else options.index,
        search={name: getattr(options, name) for name in names.get(options.index, ())}, sink=options.sink,
        recent=options.recent, slow=options.slow,
    )  # fmt: skip
    return Decision(read=read, evidence={"outside": outside(context)} if options.evidence else {})


def outside(context: Context) -> torch.Tensor:
    """fp32 [L,H]: how far a query head's queries lie from its keys."""
    seen, group = context.seen["moments"], context.geometry.group
    mean, square = (seen[f"k_{name}"] / seen["tokens"] for name in ("sum", "square"))
    covariance = square - mean[..., None] * mean[..., None, :]
    ridge = RIDGE * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    covariance = covariance + ridge[..., None, None].clamp_min(1e-30) * torch.eye(mean.shape[-1])
    mean, inverse = (x.repeat_interleave(group, 1) for x in (mean, torch.linalg.inv(covariance)))
    q_mean, q_square = (seen[f"q_{name}"] / seen["tokens"] for name in ("sum", "square"))
    cross = q_mean[..., None] * mean[..., None, :]
    off = q_square - cross - cross.mT + mean[..., None] * mean[..., None, :]
    return ((inverse * off).sum((-1, -2)).clamp_min(0) / mean.shape[-1]).sqrt().float()
