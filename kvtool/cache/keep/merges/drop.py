"""Evicted entries are gone."""

from __future__ import annotations

from kvtool.cache.keep.merges._base import Job

ONCE = True


def merge(job: Job) -> None:
    """What stays stays as it is."""
