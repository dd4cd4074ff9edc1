"""What `hadamard` is tested and measured on: head dims, widths of several heads, no rows at all."""

from __future__ import annotations

import torch

SHAPES = ((1,), (3, 2), (0, 64), (2, 3, 63, 64), (1, 2, 500, 128), (7, 256))


def inputs(
    shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> torch.Tensor:
    """x [..., D]."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
