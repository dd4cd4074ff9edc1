"""The mean key: s(q, unit) = q · k̄, the mean of the entries' own products (ShadowKV's landmarks, arXiv 2410.21465).

Of a cluster it is the centroid (RetroInfer, arXiv 2505.02922). exp(s) never exceeds the entries' mean weight (Jensen).
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries._base import Given, Parts
from kvtool_kernels.precision import wide

LOGIT = True


def summarise(k: torch.Tensor, given: Given) -> Parts:
    return (wide(k).mean(3).to(k.dtype),)


def pooled(mean: torch.Tensor, size: torch.Tensor) -> Parts:
    return (mean,)


def squares(parts: Parts) -> torch.Tensor:
    return wide(parts[0]).square().sum(-1)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return wide(q) @ wide(parts[0]).transpose(-1, -2)
