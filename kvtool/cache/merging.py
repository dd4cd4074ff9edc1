"""Evicted entries live on in kept ones: assignment, threshold, weights.

    u(e) = argmax_u cos(k_e, k_u)   or the kept entry whose place is nearest;   e joins if cos(k_e, k_u(e)) ≥ threshold
    x_u ← (n_u x_u + Σ_e w_e n_e x_e) / (n_u + Σ_e w_e n_e)   for keys and values;   n_u ← n_u + Σ_e n_e

    w_e = 1                             "equal"
    w_e = cos(k_e, k_u)                 "cosine"; there the divisor is n_u + Σ n_e, so that unlike terms shrink the mean
                                        (D2O, arXiv 2406.13035, as released)
    w_e = exp(−‖k_e − k_u‖² / 2σ_u²)    "gaussian"; σ_u is the mean distance of those that join u, since the σ of
                                        KVMerger (arXiv 2407.08454) is defined by the weights themselves

n counts entries where the plan asks for it, and is 1 elsewhere. What does not join is gone. Keys are as attention sees
them: rotated, each for its own place.

Shapes: k, v [B,K,S,D]; index int64 [B,K,N] the kept ones, in order; counts fp32 [B,K,S].
"""

from __future__ import annotations

import torch

from kvtool.slots import Select
from kvtool_kernels.precision import wide

BLOCK = 512  # entries that are compared with all kept ones at a time
Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def merged(k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, index: torch.Tensor, spec: Select) -> Merged:
    """k, v [B,K,N,D] of the kept entries after merging, and how many entries each stands for, [B,K,N]."""
    keys, kept = wide(k), _at(wide(k), index)
    best, owner = _assigned(keys, index, spec.merge)
    dropped = torch.ones_like(best, dtype=torch.bool).scatter(2, index, False)
    least: torch.Tensor | float = 0.0 if spec.threshold is None else spec.threshold
    if spec.threshold is None:
        least = best[dropped].unflatten(0, (*best.shape[:2], -1)).mean(-1, keepdim=True)
    joining = (dropped & (best >= least)).to(keys.dtype) * counts.to(keys.dtype)
    own = _at(counts[..., None].to(keys.dtype), index)[..., 0]
    total = own.scatter_add(2, owner, joining)
    weight = joining
    if spec.weigh == "cosine":
        weight = joining * best
    elif spec.weigh == "gaussian":
        square = (keys - _at(kept, owner)).square().sum(-1)
        distance = torch.zeros_like(own).scatter_add(2, owner, joining * square.sqrt()) / (total - own).clamp_min(1)
        sigma = distance.gather(2, owner)
        weight = joining * torch.where(sigma > 0, torch.exp(-square / (2 * sigma.square()).clamp_min(1e-30)), 1.0)
    divisor = total if spec.weigh == "cosine" else own.scatter_add(2, owner, weight)
    sides = []
    for x in (k, v):
        target = owner[..., None].expand(-1, -1, -1, x.shape[-1])
        summed = (own[..., None] * _at(wide(x), index)).scatter_add(2, target, weight[..., None] * wide(x))
        sides.append((summed / divisor[..., None]).to(x.dtype))
    return sides[0], sides[1], total.float()


def _assigned(keys: torch.Tensor, index: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every entry's kept one, as a place in index, and the cosine of their keys: int64 and [B,K,S]."""
    unit = torch.nn.functional.normalize(keys, dim=-1)
    kept, found = _at(unit, index), []
    for low in range(0, keys.shape[2], BLOCK):
        cosine = unit[:, :, low : low + BLOCK] @ kept.mT
        best, owner = cosine.max(-1)
        if how == "neighbour":
            places = torch.arange(low, low + cosine.shape[2], device=keys.device)[:, None]
            owner = (places - index[:, :, None]).abs().argmin(-1)
            best = cosine.gather(-1, owner[..., None])[..., 0]
        found.append((best, owner))
    return torch.cat([best for best, _ in found], 2), torch.cat([owner for _, owner in found], 2)


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B,K,S,D] at index [B,K,N] → [B,K,N,D]."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
