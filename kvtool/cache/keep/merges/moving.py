"""Averaged into the kept entry whose key has the largest cosine, if that cosine reaches a threshold that moves.

    m_e = max_u cos(k_e, k_u) over the kept u;   τ = mean(m) at first, then α·τ + β·mean(m)
    the n-th entry that each head drops joins its own u if the mean of m_e over heads is at least τ

(D2O: Wan et al., arXiv 2406.13035, as released.) Heads decide together, list by list: the n-th entries dropped are the
same token only where heads drop the same tokens. α and β are `settings["alpha"]` and `settings["beta"]`, 0.5 where not
told; τ is the lane's. `Select.weigh` is "cosine" in D2O.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Changed, Job, Merged, Near, cosines, joined, take_in
from kvtool.slots import Select

ROUNDING = 1e-6  # of cosines: equal ones all pass


def merge(job: Job) -> Merged | Changed:
    best, owner = cosines(job)
    return joined(job, best, owner, together(best, job.spec, job.memory).expand_as(best))


def join(k: torch.Tensor, v: torch.Tensor, near: Near, spec: Select, memory: dict[str, torch.Tensor]) -> None:
    take_in(k, v, near, together(near[0], spec, memory), spec)


def together(best: torch.Tensor, spec: Select, memory: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [B,1,E]: which of the entries with cosines [B,K,E] may join, all heads' n-th ones alike; τ moves on."""
    likeness = best.double().mean(1, keepdim=True)
    threshold = likeness.mean(2, keepdim=True)
    if "threshold" in memory:
        threshold = spec.settings.get("alpha", 0.5) * memory["threshold"] + spec.settings.get("beta", 0.5) * threshold
    memory["threshold"] = threshold
    return likeness >= threshold - ROUNDING
