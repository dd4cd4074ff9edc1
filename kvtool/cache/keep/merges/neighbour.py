"""Averaged into the kept entry whose place is nearest, the older of two (Elastic Cache: arXiv 2407.18121)."""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Changed, Job, Merged, at, joined
from kvtool_kernels.precision import wide


def merge(job: Job) -> Merged | Changed:
    kept, places = job.index.shape[2], job.gone
    after = torch.searchsorted(job.index.contiguous(), places).clamp_max(kept - 1)
    before = (after - 1).clamp_min(0)
    behind, ahead = (job.index.gather(2, side) for side in (before, after))
    owner = torch.where((places - behind).abs() <= (ahead - places).abs(), before, after)
    left, kept_key = (wide(at(job.view.k, place)) for place in (places, job.index.gather(2, owner)))
    return joined(job, torch.nn.functional.cosine_similarity(left, kept_key, dim=-1), owner)
