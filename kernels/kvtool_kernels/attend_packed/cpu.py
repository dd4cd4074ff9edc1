"""`attend_packed` on the CPU: codes are decoded tile by tile into the cache of a core and never held.

Up to `FEW` query rows per KV head go through compiled loops; more of them, and the shapes that the loops cannot read,
are decoded in blocks for PyTorch's flash kernel, and merged.
"""

from __future__ import annotations

import dataclasses

import torch

from kvtool_kernels._native.record import served
from kvtool_kernels.attend import cpu as attend_cpu
from kvtool_kernels.attend_packed import reference
from kvtool_kernels.merge.reference import merge
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize.cpu import dequantize

BLOCK = 4096  # entries decoded at a time


def attend_packed(
    q: torch.Tensor,
    keys: Packed | torch.Tensor,
    values: Packed | torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.attend_packed`."""
    entries = values.tokens if isinstance(values, Packed) else values.shape[2]
    if not entries or not q.numel():
        return reference.attend_packed(q, keys, values, scale=scale, softcap=softcap)
    if served(q, keys, values):
        from kvtool_kernels._native import launch  # only where codes are read: Numba is slow to import

        return launch.attend(q, keys, values, scale=scale, softcap=softcap)
    step = BLOCK - BLOCK % max(side.group if isinstance(side, Packed) else 1 for side in (keys, values))
    partial = None
    for start in range(0, entries, step):
        k, v = (decoded(side, start, min(start + step, entries)).to(q.dtype) for side in (keys, values))
        made = attend_cpu.attend(q, k, v, scale=scale, softcap=softcap)
        partial = made if partial is None else merge(partial, made)
    assert partial is not None
    return partial


def decoded(side: Packed | torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Entries `start` to `stop`, dense."""
    if isinstance(side, torch.Tensor):
        return side[:, :, start:stop]
    part = slice(start // side.group, stop // side.group) if side.layout == "token" else slice(start, stop)
    scale, zero = (t if t is None or t.shape[2] == 1 else t[:, :, part] for t in (side.scale, side.zero))
    assert scale is not None
    apart = None if side.outliers is None else (side.outliers[0][:, :, start:stop], side.outliers[1][:, :, start:stop])
    return dequantize(dataclasses.replace(side, codes=side.codes[:, :, part], scale=scale, zero=zero, outliers=apart))
