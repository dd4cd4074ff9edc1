"""`quantize` and `dequantize` on the CPU: compiled loops, bit for bit as the definition.

Codes of a table of levels stay with the reference.
"""

from __future__ import annotations

import torch

from kvtool_kernels._native.record import LANES, readable
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.quantize import reference


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float = 1.0) -> Packed:
    """As `reference.quantize`; shapes that are no whole vectors, and what is differentiated, go there."""
    whole = x.shape[-1] % LANES == 0 and (layout == "token" or group % LANES == 0) and 1 <= bits <= 8
    if not whole or not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
        return reference.quantize(x, bits=bits, group=group, layout=layout, clip=clip)
    from kvtool_kernels._native import launch  # only where codes are written: Numba is slow to import

    reference.check(x.shape[2], x.shape[3], group, layout)
    x = x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    return launch.quantize(x, bits=bits, group=group, layout=layout, clip=clip)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As `reference.dequantize`; shapes that the loops cannot read go there."""
    if not packed.codes.numel() or not readable(packed):
        return reference.dequantize(packed, dtype)
    from kvtool_kernels._native import launch  # only where codes are read: Numba is slow to import

    return launch.dequantize(packed).to(dtype)
