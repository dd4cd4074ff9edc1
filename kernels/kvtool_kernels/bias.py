"""What is added to logits."""

from __future__ import annotations

import torch


def hiding(hidden: torch.Tensor) -> torch.Tensor:
    """bool, of any shape, True = hidden → fp32: −inf there, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).masked_fill_(hidden, float("-inf"))
