"""Averaged into the kept entry whose key has the largest cosine, if that cosine reaches a threshold that moves.

    m_e = max_u cos(k_e, k_u) over the kept u;   τ = mean(m) at first, then α·τ + β·mean(m)
    the n-th entry that each head drops joins its own u if the mean of m_e over heads is at least τ

(D2O: Wan et al., arXiv 2406.13035, as released.) Heads decide together, list by list: the n-th entries dropped are the
same token only where heads drop the same tokens. α and β are `settings["alpha"]` and `settings["beta"]`, 0.5 where not
told; τ is the lane's. `Select.weigh` is "cosine" in D2O.
"""

from __future__ import annotations

from kvtool.cache.keep.merges._base import Changed, Job, Merged, cosines, joined

ROUNDING = 1e-6  # of cosines: equal ones all pass


def merge(job: Job) -> Merged | Changed:
    best, owner = cosines(job)
    likeness = best.double()
    threshold, settings = likeness.mean((1, 2), keepdim=True), job.spec.settings
    if "threshold" in job.memory:
        old = job.memory["threshold"]
        threshold = settings.get("alpha", 0.5) * old + settings.get("beta", 0.5) * threshold
    job.memory["threshold"] = threshold
    together = (likeness.mean(1, keepdim=True) >= threshold - ROUNDING).expand_as(likeness)
    return joined(job, best, owner, together)
