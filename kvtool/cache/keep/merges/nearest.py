"""Averaged into the kept entry whose key has the largest cosine with its own (D2O: Wan et al., arXiv 2406.13035)."""

from __future__ import annotations

from kvtool.cache.keep.merges._base import Changed, Job, Merged, cosines, joined


def merge(job: Job) -> Merged | Changed:
    best, owner = cosines(job)
    return joined(job, best, owner)
