"""Every key in few dimensions: s(q, unit) = max over its entries of (q · W) · (k · W).

`table` fp32 [K,D,n]: each KV head's orthonormal basis W, of which the first `rank` columns are used. Exact where keys
lie in the span.
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries._base import Given, Parts, best
from kvtool.errors import InputError
from kvtool_kernels.precision import wide, wider

LOGIT = False


def _basis(given: Given, like: torch.Tensor) -> torch.Tensor:
    if given.table is None:
        raise InputError("the summary 'low-rank' needs its calibrated bases", expected="a plan with a table")
    basis = given.table if not given.rank else given.table[..., : given.rank]
    return basis.to(like.device, wider(like.dtype))


def summarise(k: torch.Tensor, given: Given) -> Parts:
    return ((wide(k) @ _basis(given, k)[:, None]).to(k.dtype),)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return best(wide(q) @ _basis(given, q), parts[0])
