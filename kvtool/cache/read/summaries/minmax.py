"""Channel-wise minimum and maximum: an upper bound on any key's product with the query (Quest, arXiv 2406.10774).

s(q, unit) = Σ_c max(q_c · min_c, q_c · max_c)
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries._base import Given, Parts
from kvtool_kernels.ops import page_scores

LOGIT = False


def summarise(k: torch.Tensor, given: Given) -> Parts:
    return k.amin(3), k.amax(3)


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    low, high = parts
    return page_scores(q.flatten(1, 2)[:, :, None], low, high).reshape(*q.shape[:3], -1)
