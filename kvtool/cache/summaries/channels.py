"""A few calibrated channels of every key: s(q, unit) = max over its entries of Σ_{c ∈ C} q_c · k_c  (Double Sparsity's
label cache, arXiv 2408.07092).

`table` int [K,n]: each KV head's channels in order of importance, of which the first `rank` are held.
"""

from __future__ import annotations

import torch

from kvtool.cache.summaries._base import Given, Parts, best
from kvtool.errors import InputError

LOGIT = False


def _taken(x: torch.Tensor, given: Given) -> torch.Tensor:
    """The first `rank` calibrated channels of x [B,K,...,D]."""
    if given.table is None:
        raise InputError("the summary 'channels' needs its calibrated channels", expected="a plan with a table")
    order = given.table if not given.rank else given.table[:, : given.rank]
    index = order.to(x.device, torch.int64).reshape(1, len(order), *[1] * (x.dim() - 3), -1)
    return x.gather(x.dim() - 1, index.expand(*x.shape[:-1], -1))


def summarise(k: torch.Tensor, given: Given) -> Parts:
    return (_taken(k, given),)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return best(_taken(q, given), parts[0])
