"""A vector between channel-wise extremes, a linear stand-in for the largest product (MPCache, arXiv 2501.06807):

    s(q, unit) = Σ_c q_c · (α · max_c + (1 − α) · min_c)

`table` fp32 [K,1]: α of each KV head. The score is linear in q, so that one vector is held where two would be (as the
released code does). With one entry it is q · k, whatever α; with α = 1 and q ≥ 0 it bounds every product from above,
else it bounds nothing.
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries._base import Given, Parts
from kvtool.errors import InputError
from kvtool_kernels.precision import wide

LOGIT = False


def summarise(k: torch.Tensor, given: Given) -> Parts:
    if given.table is None:
        raise InputError("the summary 'between' needs its weight", expected="a plan with a table")
    weight = given.table.to(wide(k).dtype)[:, :, None]
    return ((weight * wide(k).amax(3) + (1 - weight) * wide(k).amin(3)).to(k.dtype),)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return wide(q) @ wide(parts[0]).mT
