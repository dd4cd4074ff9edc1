"""The mean of the keys that were attended most while they were recent: s(q, unit) = q · mean of the `rank` keys that
have the largest credit (InfLLM's representatives, by which ActQKV, arXiv 2502.13542, compares blocks; `credits.py`).

Where no credits are told, and with `rank` 0, all keys of the unit count alike.
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries import mean as _mean
from kvtool.cache.read.summaries._base import Given, Parts
from kvtool_kernels.precision import wide

LOGIT = False
CREDITS = True
squares = _mean.squares


def summarise(k: torch.Tensor, given: Given) -> Parts:
    if given.credit is None or not given.rank:
        return _mean.summarise(k, given)
    top = given.credit.topk(min(given.rank, k.shape[3]), dim=-1).indices
    taken = k.gather(3, top[..., None].expand(-1, -1, -1, -1, k.shape[4]))
    return (wide(taken).mean(3).to(k.dtype),)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return _mean.score(q, parts, given)
