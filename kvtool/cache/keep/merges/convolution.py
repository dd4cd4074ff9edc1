"""Some slots hold mixtures of everything that is not kept whole, with weights that a convolution gives.

    x = [k; v] of the entries that are not kept whole, in order;   W' = softmax over them of ReLU(conv(x))
    W = (1 − λ) R + λ W';   k̂ = W k,   v̂ = W v      (LoCoCo: Cai et al., arXiv 2406.05317)

R has one row a slot, one-hot: the entry that the selection would have kept there. So λ = 0 is dropping, and every row
of W sums to 1. Of N kept entries the min(C, ⌊N/2⌋) that score least become slots, in order of their places; sinks and
recent ones never do. All heads of a layer share one convolution, whose channel c is slot c. Where there are no more
entries than slots nothing is mixed. Keys are as attention sees them: rotated, each for its own place.

Tables: `convolution` [L,C,2D,kernel], `bias` [L,C], `share` [L] (λ).
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Job, Merged, at
from kvtool_kernels.precision import wide

Pair = tuple[torch.Tensor, torch.Tensor]
SCORES = True
Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of one layer: convolution, bias, share


def merge(job: Job) -> Merged:
    tables = (job.view.table("convolution"), job.view.table("bias"), job.view.table("share"))
    sides = (wide(job.view.k), wide(job.view.v))
    kept = mixed(sides, job.scores, job.index, tables, job.free)
    k, v = (x.to(job.view.k.dtype) for x in kept)
    return k, v, job.counts.gather(2, job.index)


def mixed(sides: Pair, scores: torch.Tensor, index: torch.Tensor, tables: Tables, free: slice) -> Pair:
    """(k, v) [B,K,S,D] of all entries, with their scores [B,K,S] → (k, v) [B,K,N,D] of those at index int64 [B,K,N],
    some of which are slots now, none outside `free`; differentiable in one layer's tables."""
    kernel, bias, share = (table.to(sides[0].dtype) for table in tables)
    places = slots(scores, index, len(bias), free)
    rest = others(index, places, scores.shape[2])
    kept_k, kept_v = (at(side, index) for side in sides)
    if not places.shape[2] or rest.shape[2] == places.shape[2]:
        return kept_k, kept_v
    rest_k, rest_v = (at(side, rest) for side in sides)
    count = places.shape[2]
    weight = weights(rest_k, rest_v, kernel[:count], bias[:count])
    return replaced(kept_k, places, weight @ rest_k, share), replaced(kept_v, places, weight @ rest_v, share)


def slots(scores: torch.Tensor, index: torch.Tensor, channels: int, free: slice) -> torch.Tensor:
    """Which of the entries at index int64 [B,K,N] become slots, as places in index, in order, int64 [B,K,C]; of equal
    scores [B,K,S] the older entry."""
    low, high, _ = free.indices(scores.shape[2])
    kept, sure = index.shape[2], (index < low) | (index >= high)
    count = min(channels, kept // 2, kept - int(sure[0, 0].sum()))
    own = scores.gather(2, index).masked_fill(sure, float("inf"))
    return torch.argsort(own, dim=-1, stable=True)[..., : max(0, count)].sort(-1).values


def others(index: torch.Tensor, places: torch.Tensor, entries: int) -> torch.Tensor:
    """What is not kept whole, of so many entries: all but those at index, and the slots; in order, int64 [B,K,M]."""
    kept = torch.ones_like(index, dtype=torch.bool).scatter(2, places, False)
    whole = torch.zeros(*index.shape[:2], entries, dtype=torch.bool, device=index.device).scatter(2, index, kept)
    count = entries - index.shape[2] + places.shape[2]
    return torch.argsort(whole.byte(), dim=-1, stable=True)[..., :count]


def weights(k: torch.Tensor, v: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """k, v [B,K,M,D], kernel [C,2D,width], bias [C] → W' [B,K,C,M]."""
    x = torch.cat([k, v], dim=-1).flatten(0, 1).mT
    logits = torch.nn.functional.conv1d(x, kernel, bias, padding=kernel.shape[-1] // 2).relu()
    return torch.softmax(logits, dim=-1).unflatten(0, k.shape[:2])


def replaced(kept: torch.Tensor, places: torch.Tensor, mixed: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """kept [B,K,N,D] with (1 − λ) of itself and λ of mixed [B,K,C,D] at places int64 [B,K,C]."""
    target = places[..., None].expand(-1, -1, -1, kept.shape[-1])
    return kept.scatter(2, target, torch.lerp(kept.gather(2, target), mixed, share))
