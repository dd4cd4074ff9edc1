"""Dispatch by device: the one place that callers import operations from.

CPU tensors take `<op>/cpu.py` where it exists; everything else takes the reference, which is plain PyTorch and runs
on any device.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend import cpu as _attend_cpu
from kvtool_kernels.attend import reference as _attend_reference
from kvtool_kernels.merge.reference import merge

__all__ = ["attend", "merge"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one segment with its log-sum-exp; see `attend/reference.py` for the formula and the shapes."""
    twin = _attend_cpu if q.device.type == "cpu" else _attend_reference
    return twin.attend(q, k, v, scale=scale, causal=causal, bias=bias, softcap=softcap)
