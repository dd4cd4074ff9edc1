"""The mean key of the unit: s(q, unit) = q · k̄."""

from __future__ import annotations

import torch


def summarise(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys of whole units, [B,K,U,unit,D] → tensors with units on axis 2."""
    return (k.float().mean(3).to(k.dtype),)


def score(q: torch.Tensor, summary: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """q [B,K,G,D] → fp32 [B,K,G,U]."""
    return q.float() @ summary[0].float().transpose(-1, -2)
