"""Evicted entries live on in kept ones: assignment, threshold, weights.

A rule is a file with `merge(job)`, which gives what stays (`Merged`), or what of it changes (`Changed`), or None if
nothing does; with `SCORES = True` if it looks at scores, and `ONCE = True` if nothing changes at decode steps. Those
that average entries into kept ones assign every entry to a kept one and leave the rest to `joined`:

    e joins its owner u(e) if cos(k_e, k_u(e)) ≥ threshold
    x_u ← (n_u x_u + Σ_e w_e n_e x_e) / (n_u + Σ_e w_e n_e)   for keys and values;   n_u ← n_u + Σ_e n_e

    w_e = 1                             "equal"
    w_e = cos(k_e, k_u)                 "cosine"; there the divisor is n_u + Σ n_e, so that unlike terms shrink the mean
                                        (D2O, arXiv 2406.13035, as released)
    w_e = exp(−‖k_e − k_u‖² / 2σ_u²)    "gaussian"; σ_u is the mean distance of those that join u, since the σ of
                                        KVMerger (arXiv 2407.08454) is defined by the weights themselves

n counts entries where the plan asks for it, and is 1 elsewhere. What does not join is gone. Keys are as attention sees
them: rotated, each for its own place.

Shapes: k, v [B,K,S,D]; index int64 [B,K,N] the kept ones and gone int64 [B,K,E] the others, in order; counts fp32
[B,K,S].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.slots import Select
from kvtool_kernels.precision import wide

BLOCK = 512  # entries that are compared with all kept ones at a time
FEW = 16  # entries that leave at once, as they do at decode steps: what stays is then not copied
Merged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Near = tuple[torch.Tensor, torch.Tensor]  # the largest cosine of the key that leaves with a kept one, and its place


@dataclass(frozen=True)
class Changed:
    """Of the N kept entries those at places int64 [B,K,E] become k, v [B,K,E,D], one place twice being the same twice;
    counts [B,K,N] are those of all."""

    places: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Job:
    """The entries of `view`, their scores [B,K,S] and counts fp32 [B,K,S], of which those at index int64 [B,K,N] stay.

    free: the entries that do not stay whatever they score.
    """

    view: View
    scores: torch.Tensor
    counts: torch.Tensor
    index: torch.Tensor
    free: slice = field(default_factory=lambda: slice(None))

    @property
    def memory(self) -> dict[str, torch.Tensor]:
        """What rules keep from one call to the next."""
        return self.view.memory

    @property
    def spec(self) -> Select:
        return self.view.spec

    @cached_property
    def gone(self) -> torch.Tensor:
        """int64 [B,K,E]: the entries that do not stay."""
        count = self.scores.shape[2] - self.index.shape[2]
        return dropped(self).nonzero()[:, 2].reshape(*self.index.shape[:2], count)


def joined(job: Job, best: torch.Tensor, owner: torch.Tensor, passing: torch.Tensor | None = None) -> Merged | Changed:
    """What stays, after merging.

    owner int64 [B,K,E]: the kept one of each that is gone, as a place in index; best [B,K,E]: the cosine of their keys.
    passing bool [B,K,E]: which may join, instead of those whose cosine reaches the threshold.
    """
    spec, index = job.spec, job.index
    if passing is None:
        least = best.mean(-1, keepdim=True) if spec.threshold is None else spec.threshold
        passing = best >= least
    joining = passing.to(best.dtype) * job.counts.gather(2, job.gone).to(best.dtype)
    own = job.counts.gather(2, index).to(best.dtype)
    total = own.scatter_add(2, owner, joining)
    weight = joining
    if spec.weigh == "cosine":
        weight = joining * best
    elif spec.weigh == "gaussian":
        square = (wide(at(job.view.k, job.gone)) - wide(at(job.view.k, index.gather(2, owner)))).square().sum(-1)
        distance = torch.zeros_like(own).scatter_add(2, owner, joining * square.sqrt()) / (total - own).clamp_min(1)
        sigma = distance.gather(2, owner)
        weight = joining * torch.where(sigma > 0, torch.exp(-square / (2 * sigma.square()).clamp_min(1e-30)), 1.0)
    divisor = total if spec.weigh == "cosine" else own.scatter_add(2, owner, weight)
    if owner.shape[2] <= FEW:
        k, v = (_met(x, job, owner, own, weight, divisor) for x in (job.view.k, job.view.v))
        return Changed(owner, k, v, total.float())
    k, v = (averaged(x, job.gone, index, owner, own, weight, divisor) for x in (job.view.k, job.view.v))
    return k, v, total.float()


def dropped(job: Job) -> torch.Tensor:
    """bool [B,K,S]: the entries that do not stay."""
    return torch.ones(job.scores.shape, dtype=torch.bool, device=job.index.device).scatter(2, job.index, False)


def averaged(
    x: torch.Tensor, source: torch.Tensor, index: torch.Tensor, owner: torch.Tensor, own: torch.Tensor,
    weight: torch.Tensor, divisor: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """(own · kept x + Σ weight · x of those that join) / divisor: x [B,K,S,D] → [B,K,N,D]; own and divisor [B,K,N];
    source, owner and weight [B,K,E] of those that may join."""
    target = owner[..., None].expand(-1, -1, -1, x.shape[-1])
    summed = (own[..., None] * at(wide(x), index)).scatter_add(2, target, weight[..., None] * wide(at(x, source)))
    return (summed / divisor[..., None]).to(x.dtype)


def _met(
    x: torch.Tensor, job: Job, owner: torch.Tensor, own: torch.Tensor, weight: torch.Tensor, divisor: torch.Tensor
) -> torch.Tensor:
    """`averaged` at the owners alone, [B,K,E,D]."""
    alike = (owner[..., None] == owner[..., None, :]).to(weight.dtype) * weight[..., None, :]
    summed = own.gather(2, owner)[..., None] * wide(at(x, job.index.gather(2, owner))) + alike @ wide(at(x, job.gone))
    return (summed / divisor.gather(2, owner)[..., None]).to(x.dtype)


def take_in(k: torch.Tensor, v: torch.Tensor, near: Near, passing: torch.Tensor, spec: Select) -> None:
    """The last entry of k, v [B,K,S,D] joins its owner where it passes, bool [B,1,1] or [B,K,1], in place: `joined`
    where one leaves, each stands for one, and weights are not gaussian."""
    best, owner = near
    joining = passing.to(best.dtype)
    weight = (joining * best if spec.weigh == "cosine" else joining)[..., None]
    divisor = (1 + joining)[..., None]
    for x in (k, v):
        place = owner[..., None].expand(-1, -1, -1, x.shape[-1])
        met = (wide(x.gather(2, place)) + weight * wide(x[:, :, -1:])) / divisor
        x.scatter_(2, place, met.to(x.dtype))


def cosines(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept entry whose key has the largest cosine with that of each that is gone, as a place in index, int64
    [B,K,E], and that cosine [B,K,E] (in this order: cosine, place)."""
    unit = torch.nn.functional.normalize(wide(at(job.view.k, job.gone)), dim=-1)
    if job.gone.shape[2] <= FEW:
        keys = wide(job.view.k)
        likeness = unit @ keys.mT / keys.norm(dim=-1)[:, :, None].clamp_min(1e-12)
        gone = job.gone[:, :, None].expand(-1, -1, unit.shape[2], -1)
        best, place = likeness.scatter_(3, gone, float("-inf")).max(-1)
        return best, torch.searchsorted(job.index.contiguous(), place)
    kept = torch.nn.functional.normalize(wide(at(job.view.k, job.index)), dim=-1).mT
    found = [(unit[:, :, low : low + BLOCK] @ kept).max(-1) for low in range(0, unit.shape[2], BLOCK)]
    return torch.cat([best for best, _ in found], 2), torch.cat([owner for _, owner in found], 2)


def at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B,K,S,D] at index [B,K,N] → [B,K,N,D]."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
