"""`hadamard` on a GPU: a tile of rows times ±1, which a program makes from the indices: H[i,j] = (−1)^popcount(i & j).

Nothing but x is read, and ±1 is exact in every dtype, so that 16-bit rows go to the tensor cores as they are. Head
dims above 256 take the definition's product with the stored matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtool_kernels.hadamard import reference
from kvtool_kernels.tiles import INTERPRETED, dot, pad, warps

LARGEST = 256


@triton.jit  # type: ignore[untyped-decorator]
def hadamard_kernel(x, y, rows, width, factor, M: tl.constexpr, C: tl.constexpr):
    """C channels of M rows, from C channels of x at a time."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1) * C + tl.arange(0, C)
    acc = tl.zeros([M, C], tl.float32)
    for start in range(0, width, C):
        channel = start + tl.arange(0, C)
        mask = (row < rows)[:, None] & (channel < width)[None, :]
        value = tl.load(x + row[:, None] * width + channel[None, :], mask=mask, other=0.0)
        both = channel[:, None] & column[None, :]
        both ^= both >> 4
        both ^= both >> 2
        both ^= both >> 1
        acc += dot(value, (1 - 2 * (both & 1)).to(tl.float32).to(value.dtype))
    mask = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(y + row[:, None] * width + column[None, :], (acc * factor).to(y.dtype.element_ty), mask=mask)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """As `reference.hadamard`."""
    width = x.shape[-1]
    if width < 1 or width & width - 1 or width > LARGEST:
        return reference.hadamard(x)
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // width
    if rows:
        block = 256 if INTERPRETED.value else 16 if x.dtype == torch.float32 else 64
        channels = min(32, pad(width))
        hadamard_kernel[(triton.cdiv(rows, block), triton.cdiv(width, channels))](
            x, y, rows, width, width**-0.5, M=block, C=channels, num_warps=warps(4), num_stages=2
        )  # fmt: skip
    return y
