"""The mean key times √n: s(q, unit) = √n · q · k̄, whose spread does not shrink with the unit's size n (DHSA, arXiv
2510.24606). Among units of one size the order is that of `mean`.
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries import mean as _mean
from kvtool.cache.read.summaries._base import Given, Parts
from kvtool_kernels.precision import wide

LOGIT = False
squares = _mean.squares


def summarise(k: torch.Tensor, given: Given) -> Parts:
    return ((wide(k).mean(3) * k.shape[3] ** 0.5).to(k.dtype),)


def pooled(mean: torch.Tensor, size: torch.Tensor) -> Parts:
    return ((wide(mean) * wide(size)[..., None].sqrt()).to(mean.dtype),)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return _mean.score(q, parts, given)
