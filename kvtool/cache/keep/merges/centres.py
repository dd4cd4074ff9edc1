"""What scores next best is averaged into the kept key most like it, by score; what resembles none of them is gone.

    candidates: the best `settings["candidates"]` · N of the entries dropped, N being those kept
    e joins its centre u if cos(k_e, k_u) ≥ threshold, else the zero class, which is thrown away
    x_u ← (s_u x_u + Σ_e s_e x_e) / (s_u + Σ_e s_e);   then k_u is scaled to the norm that it had

(EMS: arXiv 2412.08521, reconstructed: head-wise eviction, then merging with a zero class and kept norms is what is
known of it.) s are the scores, which must not be negative; an entry that stands for n counts n times.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.merges._base import Job, Merged, at, averaged, cosines
from kvtool_kernels.precision import wide

SCORES = True


def merge(job: Job) -> Merged:
    best, owner = cosines(job)
    spec, kept = job.spec, job.index.shape[2]
    scores = job.scores.to(best.dtype).clamp_min(1e-30) * job.counts.to(best.dtype)
    threshold = -2.0 if spec.threshold is None else spec.threshold
    joining = (best >= threshold) & candidates(job, round(float(spec.settings["candidates"]) * kept))
    weight, own = scores.gather(2, job.gone) * joining, scores.gather(2, job.index)
    divisor = own.scatter_add(2, owner, weight)
    k, v = (averaged(x, job.gone, job.index, owner, own, weight, divisor) for x in (job.view.k, job.view.v))
    before, after = (wide(x).norm(dim=-1, keepdim=True) for x in (at(job.view.k, job.index), k))
    number = job.counts.gather(2, job.index).float()
    total = number.scatter_add(2, owner, (weight > 0) * job.counts.gather(2, job.gone).float())
    return torch.where((total > number)[..., None], wide(k) * before / after.clamp_min(1e-30), wide(k)).to(k), v, total


def candidates(job: Job, most: int) -> torch.Tensor:
    """bool [B,K,E]: the so many best of those that are gone."""
    ranked = job.scores.gather(2, job.gone).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(job.gone, dtype=torch.bool).scatter(2, ranked[..., :most], True)
