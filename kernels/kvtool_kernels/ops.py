"""Dispatch by device: the one place that callers import operations from.

CPU tensors take `<op>/cpu.py`, CUDA tensors `<op>/triton.py`, where these exist; everything else takes plain
PyTorch, which runs on any device.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend import cpu as _attend_cpu
from kvtool_kernels.attend import reference as _attend_reference
from kvtool_kernels.attention_statistics import blocked as _statistics
from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.merge import reference as _merge_reference
from kvtool_kernels.merge.reference import Partial

__all__ = ["attend", "attention_statistics", "merge"]


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


def merge(a: Partial, b: Partial) -> Partial:
    """Two partial results over disjoint entries → the result over both; see `merge/reference.py`."""
    if a[0].is_cuda:
        from kvtool_kernels.merge import triton as _merge_triton  # only where there is a GPU: Triton is slow to import

        return _merge_triton.merge(a, b)
    return _merge_reference.merge(a, b)


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cells: int = 1,
    first: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> Summary:
    """Attention over one sequence with its sums; see `attention_statistics/reference.py` for formulas and shapes.

    The blocked twin is plain PyTorch and runs on any device; `sink_logits` fp32 [H] join each row's softmax with
    value 0.
    """
    return _statistics.attention_statistics(
        q, k, v, scale=scale, cells=cells, first=first, window=window, softcap=softcap, sink_logits=sink_logits
    )
