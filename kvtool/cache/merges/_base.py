"""Evicted entries live on in kept ones: assignment, threshold, weights.

A rule is a file with `merge(job) -> Merged`. Those that average entries into kept ones assign every entry to a kept
one and leave the rest to `joined`:

    e joins its owner u(e) if cos(k_e, k_u(e)) ≥ threshold
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

from dataclasses import dataclass, field

import torch

from kvtool.cache.scores._base import View
from kvtool.slots import Select
from kvtool_kernels.precision import wide

BLOCK = 512  # entries that are compared with all kept ones at a time
Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """The entries of `view`, their scores [B,K,S] and counts fp32 [B,K,S], of which those at index int64 [B,K,N] stay.

    memory: what a rule keeps from one call to the next, tensors [B,...] of its own naming. free: the entries that do
    not stay whatever they score.
    """

    view: View
    scores: torch.Tensor
    counts: torch.Tensor
    index: torch.Tensor
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    free: slice = field(default_factory=lambda: slice(None))

    @property
    def spec(self) -> Select:
        return self.view.spec


def joined(job: Job, best: torch.Tensor, owner: torch.Tensor, passing: torch.Tensor | None = None) -> Merged:
    """k, v [B,K,N,D] of the kept entries after merging, and how many entries each stands for, [B,K,N].

    owner int64 [B,K,S]: every entry's kept one, as a place in index; best [B,K,S]: the cosine of their keys. passing
    bool [B,K,S]: which may join, instead of those whose cosine reaches the threshold.
    """
    spec, index = job.spec, job.index
    keys, kept = wide(job.view.k), at(wide(job.view.k), index)
    left = dropped(job)
    if passing is None:
        least: torch.Tensor | float = 0.0 if spec.threshold is None else spec.threshold
        if spec.threshold is None:
            least = best[left].unflatten(0, (*best.shape[:2], -1)).mean(-1, keepdim=True)
        passing = best >= least
    joining = (left & passing).to(keys.dtype) * job.counts.to(keys.dtype)
    own = at(job.counts[..., None].to(keys.dtype), index)[..., 0]
    total = own.scatter_add(2, owner, joining)
    weight = joining
    if spec.weigh == "cosine":
        weight = joining * best
    elif spec.weigh == "gaussian":
        square = (keys - at(kept, owner)).square().sum(-1)
        distance = torch.zeros_like(own).scatter_add(2, owner, joining * square.sqrt()) / (total - own).clamp_min(1)
        sigma = distance.gather(2, owner)
        weight = joining * torch.where(sigma > 0, torch.exp(-square / (2 * sigma.square()).clamp_min(1e-30)), 1.0)
    divisor = total if spec.weigh == "cosine" else own.scatter_add(2, owner, weight)
    k, v = (averaged(x, index, owner, own, weight, divisor) for x in (job.view.k, job.view.v))
    return k, v, total.float()


def dropped(job: Job) -> torch.Tensor:
    """bool [B,K,S]: the entries that do not stay."""
    return torch.ones_like(job.scores, dtype=torch.bool).scatter(2, job.index, False)


def averaged(
    x: torch.Tensor, index: torch.Tensor, owner: torch.Tensor, own: torch.Tensor, weight: torch.Tensor,
    divisor: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """(own · kept x + Σ weight · x of those that join) / divisor: x [B,K,S,D] → [B,K,N,D]; own, divisor [B,K,N]."""
    target = owner[..., None].expand(-1, -1, -1, x.shape[-1])
    summed = (own[..., None] * at(wide(x), index)).scatter_add(2, target, weight[..., None] * wide(x))
    return (summed / divisor[..., None]).to(x.dtype)


def cosines(keys: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept entry whose key has the largest cosine with each entry's, as a place in index, int64 [B,K,S], and that
    cosine [B,K,S] (in this order: cosine, place)."""
    unit = torch.nn.functional.normalize(wide(keys), dim=-1)
    kept = at(unit, index).mT
    found = [(unit[:, :, low : low + BLOCK] @ kept).max(-1) for low in range(0, keys.shape[2], BLOCK)]
    return torch.cat([best for best, _ in found], 2), torch.cat([owner for _, owner in found], 2)


def at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B,K,S,D] at index [B,K,N] → [B,K,N,D]."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
