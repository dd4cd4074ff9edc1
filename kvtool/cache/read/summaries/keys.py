"""The keys themselves, nothing held: s(q, unit) = max over its entries of q · k, exact (the selector layers of
TidalDecode, arXiv 2410.05076).

With `rank` r each query head looks at its own r largest channels only, and its products are scaled as if |q| were
spread evenly (SparQ; SparF, arXiv 2409.04992):

    C = the r channels of largest |q_c|;   s = Σ_{c ∈ C} q_c · k_c / √(Σ_{c ∈ C} |q_c| / Σ_c |q_c|)
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries._base import Given, Parts, best
from kvtool_kernels.precision import wide

LOGIT = False


def summarise(k: torch.Tensor, given: Given) -> Parts:
    return ()


def share(given: Given, width: int, group: int) -> float:
    """Query heads of a group look at channels of their own: at most all of them."""
    return min(1.0, group * given.rank / width) if given.rank else 1.0


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    """`parts` is the keys, [B,K,U,unit,D]."""
    if not given.rank:
        return best(q, parts[0])
    size = wide(q).abs()
    top = torch.zeros_like(size).scatter(3, size.topk(given.rank, dim=-1).indices, 1.0)
    held = (size * top).sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    return best(wide(q) * top, parts[0]) / held.clamp_min(torch.finfo(size.dtype).tiny).sqrt()
