"""At the end of a prompt entries are averaged into the nearest kept one; at decode steps they are gone.

    x_u ← (x_u + Σ_e x_e) / (1 + number of e),   u(e) the kept entry with the least |place of e − place of u|

Of two as near it is the older. Entries that stay whatever they score (sinks, the last) take nothing in. (Elastic Cache:
Liu et al., arXiv 2407.18121, as released.) `settings["shift"]`: an entry so many places before is averaged in instead
of each one that leaves: the released code forgets to add the number of sinks to their places.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Job, Merged, at, averaged, dropped
from kvtool_kernels.precision import wide

ONCE = True


def merge(job: Job) -> Merged | None:
    if job.view.turn:
        return None
    gone, held = dropped(job), job.scores.shape[2]
    anchors = ~gone
    anchors[..., : job.spec.sink] = anchors[..., held - max(1, int(job.spec.recent)) :] = False
    shift = int(job.spec.settings.get("shift", 0))
    source = torch.nn.functional.pad(gone[..., shift:], (0, shift)) & anchors.any(-1, keepdim=True)
    owner = (~gone).cumsum(-1).sub(1).clamp_min(0).gather(2, nearest(anchors))
    every = torch.arange(held, device=gone.device).expand_as(gone)
    dtype = wide(job.view.k).dtype
    own, weight = at(job.counts[..., None], job.index)[..., 0].to(dtype), source.to(dtype) * job.counts.to(dtype)
    total = own.scatter_add(2, owner, weight)
    k, v = (averaged(x, every, job.index, owner, own, weight, total) for x in (job.view.k, job.view.v))
    return k, v, total.float()


def nearest(anchors: torch.Tensor) -> torch.Tensor:
    """int64 [B,K,S]: to every place the nearest one that is True, the older of two; 0 if there is none."""
    count = anchors.shape[-1]
    place = torch.arange(count, device=anchors.device).expand(anchors.shape)
    far = 2 * count
    before = torch.where(anchors, place, -far).cummax(-1).values
    after = torch.where(anchors, place, far).flip(-1).cummin(-1).values.flip(-1)
    found = torch.where(place - before <= after - place, before, after)
    return torch.where(anchors.any(-1, keepdim=True), found, 0)
