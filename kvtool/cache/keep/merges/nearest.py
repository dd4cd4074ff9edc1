"""Averaged into the kept entry whose key has the largest cosine with its own (D2O: Wan et al., arXiv 2406.13035)."""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Changed, Job, Merged, Near, cosines, joined, take_in
from kvtool.slots import Select


def merge(job: Job) -> Merged | Changed:
    best, owner = cosines(job)
    return joined(job, best, owner)


def join(k: torch.Tensor, v: torch.Tensor, near: Near, spec: Select, memory: dict[str, torch.Tensor]) -> None:
    least = near[0] if spec.threshold is None else spec.threshold
    take_in(k, v, near, near[0] >= least, spec)
