"""Channel-wise minimum and maximum: an upper bound on any key's product with the query (Quest, arXiv 2406.10774).

s(q, unit) = Σ_c max(q_c · min_c, q_c · max_c)
"""

from __future__ import annotations

import torch


def summarise(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys of whole units, [B,K,U,unit,D] → tensors with units on axis 2."""
    return k.amin(3), k.amax(3)


def score(q: torch.Tensor, summary: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """q [B,K,G,D] → fp32 [B,K,G,U]."""
    low, high = (part.float().transpose(-1, -2) for part in summary)
    q = q.float()
    return q.clamp_min(0) @ high + q.clamp_max(0) @ low
