"""LouisKV: what to read is chosen again only where the query jumps: clusters of the prompt, segments of the answer.

arXiv 2510.11292. Reconstructed: no code was found, and the paper is known by its abstract and by two
descriptions (card C7).

    once the prompt is in: k-means on the keys of each KV head, one centroid for `unit` entries
    r_t = mean over the group's query heads of cos(q_t−1, q_t);   r_t < τ ends a segment of what is being written
    where a segment begins: softmax of q · centroid over clusters and segments, mean over the group;   read the best

Between such steps the same entries are read again, so that nothing new is fetched from host memory (`slow`), where all
lives but sinks and a window of recent entries. A segment is what was written between two jumps; its centroid is its
mean key. Nothing is clustered again.

τ is 0.7 for Qwen3-8B, by the descriptions, one number for a model. Here `mode=calibrated` takes for each layer that τ
below which the share `rate` of a text's steps fall, and `mode=fixed` takes `tau`. Inferred, and ours: r_t is of each KV
head and layer by itself (the descriptions average over all heads); k-means is RetroInfer's, with cosines; and `period`
steps after a choice the next one falls due in any case, since slow drift never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context, Decision, share
from kvtool.options import at_least
from kvtool.slots import Read

STATISTICS = ("jumps",)
MODEL = False


@dataclass(frozen=True)
class Options:
    """budget: entries that a step reads, a share of all when at most 1, else a count. unit: entries of a cluster, on
    average. mode: thresholds of the layers calibrated, or one that is given (fixed). rate: share of the steps of a text
    at which mode=calibrated chooses anew. tau: threshold of mode=fixed. period: steps after which a choice is made in
    any case; 0 never. dense: first layers that read everything. sink, recent: entries that are always read. slow: the
    others live in host memory."""

    budget: float = 0.1
    unit: int = 16
    mode: Literal["calibrated", "fixed"] = "calibrated"
    rate: float = 0.25
    tau: float = 0.7
    period: int = 64
    dense: int = 0
    sink: int = 16
    recent: int = 64
    slow: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "unit", "recent")
        at_least(0, self, "period", "dense", "sink")
        share(self.rate, "rate")
        if self.budget <= 0:
            raise InputError("bad option budget", got=self.budget, expected="more than 0")


def at(budget: float) -> dict[str, Any]:
    """A share of what is read: everything is held."""
    return {"budget": budget}


def calibrate(context: Context, options: Options) -> Decision:
    seen = context.seen["jumps"]
    count = seen["count"].sum(1)
    tau = quantiles(count, options.rate) if options.mode == "calibrated" else torch.full((len(count),), options.tau)
    budget = torch.full((context.geometry.layers,), options.budget)
    budget[: options.dense] = 1.0
    read = Read(
        budget, unit=options.unit, form="cluster", summary="mean", cut="queries", apart=tau, heads="mean", softmax=True,
        period=options.period, renew=True, sink=options.sink, recent=options.recent, slow=options.slow,
    )  # fmt: skip
    calm = _middles(count.shape[1]) >= tau[:, None]
    overlap = (seen["overlap"].sum(1) * calm).sum(1) / (count * calm).sum(1).clamp_min(1)
    return Decision(read=read, evidence={"tau": tau, "cosines": count.float(), "overlap": overlap.float()})


def quantiles(count: torch.Tensor, share: float) -> torch.Tensor:
    """count [L,N] of equal bins from −1 to 1 → fp32 [L]: where so large a share lies below, linear within a bin."""
    below = count.double().cumsum(1) / count.sum(1, keepdim=True).clamp_min(1)
    at = (below < share).sum(1).clamp_max(count.shape[1] - 1)
    upper = below.gather(1, at[:, None])[:, 0]
    lower = torch.where(at > 0, below.gather(1, (at - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    within = ((share - lower) / (upper - lower).clamp_min(1e-12)).clamp(0, 1)
    return (2 * (at + within) / count.shape[1] - 1).float()


def _middles(bins: int) -> torch.Tensor:
    return (2 * torch.arange(bins) + 1) / bins - 1
