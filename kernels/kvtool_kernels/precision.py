"""The precision of arithmetic: fp32 at least, whatever tensors are held in."""

from __future__ import annotations

import torch


def wider(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else becomes fp32."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the precision of arithmetic."""
    return x.to(wider(x.dtype))
