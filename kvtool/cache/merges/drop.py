"""Evicted entries are gone."""

from __future__ import annotations

from kvtool.cache.merges._base import Job, Merged, at


def merge(job: Job) -> Merged:
    return at(job.view.k, job.index), at(job.view.v, job.index), job.counts.gather(2, job.index)
