"""`dequantize` on the CPU: compiled loops. Coding, which happens once per entry, stays with the reference."""

from __future__ import annotations

import torch

from kvtool_kernels._native.record import readable
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize import reference


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As `reference.dequantize`; shapes that the loops cannot read go there."""
    if not packed.codes.numel() or not readable(packed):
        return reference.dequantize(packed, dtype)
    from kvtool_kernels._native import launch  # only where codes are read: Numba is slow to import

    return launch.dequantize(packed).to(dtype)
