"""Averaged into the kept entry whose place is nearest, the older of two (Elastic Cache: arXiv 2407.18121)."""

from __future__ import annotations

import torch

from kvtool.cache.merges._base import Job, Merged, at, joined
from kvtool_kernels.precision import wide


def merge(job: Job) -> Merged:
    keys, kept = wide(job.view.k), job.index.shape[2]
    places = torch.arange(keys.shape[2], device=keys.device)
    after = torch.searchsorted(job.index.contiguous(), places.expand(*job.index.shape[:2], -1).contiguous()).clamp_max(
        kept - 1
    )
    before = (after - 1).clamp_min(0)
    behind, ahead = (job.index.gather(2, side) for side in (before, after))
    owner = torch.where((places - behind).abs() <= (ahead - places).abs(), before, after)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    return joined(job, (unit * at(at(unit, job.index), owner)).sum(-1), owner)
