"""Every entry meets the kept one whose key has the largest cosine halfway; then they are averaged.

    x_u ← (x_u + Σ_e (x_e + x_u) / 2) / (1 + number of e)      (LOOK-M's pivot merge: arXiv 2406.18139, as released)

So half of what joins is the kept entry itself. An entry that stands for n counts n times.
"""

from __future__ import annotations

from kvtool.cache.keep.merges._base import Job, Merged, averaged, cosines
from kvtool_kernels.precision import wide


def merge(job: Job) -> Merged:
    _, owner = cosines(job)
    dtype = wide(job.view.k).dtype
    joining, own = (job.counts.gather(2, at).to(dtype) for at in (job.gone, job.index))
    total = own.scatter_add(2, owner, joining)
    kept = (own + total) / 2  # own, and half of what joins
    k, v = (averaged(x, job.gone, job.index, owner, kept, joining / 2, total) for x in (job.view.k, job.view.v))
    return k, v, total.float()
