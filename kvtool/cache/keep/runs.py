"""Runs of consecutive entries whose keys resemble one another.

    entries i and i + 1 stand in one run if cos(k_i, k_{i+1}) > ε, and neither of them stands alone

(KVMerger: Wang et al., arXiv 2407.08454.) A run that is told link by link is the same from either end, so the
published scan from the last entry to the first is not imitated. With a budget, ε is what leaves so many runs: the
strongest links hold, of equal ones the newer.
"""

from __future__ import annotations

import torch

from kvtool_kernels.precision import wide

CUT = -2.0  # below every cosine


def links(keys: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """keys [B,K,S,D], alone bool [B,K,S] → cosines of neighbours [B,K,S−1], CUT beside those that stand alone."""
    unit = torch.nn.functional.normalize(wide(keys), dim=-1)
    likeness = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1).clamp(-1, 1)
    return likeness.masked_fill(alone[..., 1:] | alone[..., :-1], CUT)


def runs(linked: torch.Tensor, count: int, epsilon: torch.Tensor | None = None) -> torch.Tensor:
    """The run of each entry, int64 [B,K,S]: `count` of them, or fewer if links above epsilon [K] leave fewer.

    There are more only where too many entries stand alone."""
    excess = max(0, linked.shape[-1] + 1 - count)
    newest = linked.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :excess]
    holds = torch.zeros_like(linked, dtype=torch.bool).scatter(-1, linked.shape[-1] - 1 - newest, True)
    if epsilon is not None:
        holds |= linked > epsilon[:, None]
    holds &= linked > CUT
    return torch.nn.functional.pad((~holds).cumsum(-1), (1, 0))


def needed(linked: torch.Tensor, count: int) -> torch.Tensor:
    """fp32 [B,K]: the ε that leaves `count` runs."""
    excess = linked.shape[-1] + 1 - count
    if excess <= 0:
        return torch.ones(linked.shape[:2], dtype=torch.float32)
    return linked.sort(dim=-1, descending=True).values[..., excess - 1].float()


def pivots(run: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The best entry of each run by scores [B,K,S], of equals the newest: int64 [B,K,N]; every row has N runs."""
    number = int(run[..., -1].max()) + 1
    top = scores.new_full((*scores.shape[:2], number), float("-inf")).scatter_reduce(2, run, scores, "amax")
    place = torch.arange(run.shape[-1], device=run.device).expand(run.shape)
    is_top = torch.where(scores == top.gather(2, run), place, -1)
    return place.new_full(top.shape, -1).scatter_reduce(2, run, is_top, "amax")


def sole(scores: torch.Tensor, count: int, free: slice, heavy: float) -> torch.Tensor:
    """bool [B,K,S]: the entries that stand alone: those outside `free`, and [heavy · count] of the best others, as far
    as `count` runs can be had besides."""
    held = scores.shape[-1]
    first = min(free.start, count - 1)
    last = max(first, free.stop, held - (count - 1 - first))
    always = held - (last - first)
    room = max(0, count - always - 1) // 2
    most = min(round(heavy * count), room, last - first)
    alone = torch.ones_like(scores, dtype=torch.bool)
    alone[..., first:last] = False
    best = scores[..., first:last].flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return alone.scatter(-1, last - 1 - best, True)
