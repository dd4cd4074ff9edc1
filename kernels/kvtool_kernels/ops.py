"""Dispatch by device: the one place that callers import operations from.

CPU tensors take `<op>/cpu.py`, CUDA tensors `<op>/triton.py`, where these exist; everything else takes plain
PyTorch, which runs on any device.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend import cpu as _attend_cpu
from kvtool_kernels.attend import reference as _attend_reference
from kvtool_kernels.attend_packed import reference as _attend_packed_reference
from kvtool_kernels.attention_statistics import blocked as _statistics
from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.hadamard import reference as _hadamard_reference
from kvtool_kernels.merge import reference as _merge_reference
from kvtool_kernels.merge.reference import Partial
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.packing import reference as _packing_reference
from kvtool_kernels.quantize import reference as _quantize_reference

__all__ = [
    "attend",
    "attend_packed",
    "attention_statistics",
    "dequantize",
    "hadamard",
    "merge",
    "pack",
    "pack_trits",
    "quantize",
    "quantize_levels",
    "unpack",
    "unpack_trits",
]


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


def attend_packed(
    q: torch.Tensor,
    keys: Packed | torch.Tensor,
    values: Packed | torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one coded segment with its log-sum-exp; see `attend_packed/reference.py`."""
    return _attend_packed_reference.attend_packed(q, keys, values, scale=scale, softcap=softcap)


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float = 1.0) -> Packed:
    """Entries [B,K,S,D] to affine codes with a range per group; see `quantize/reference.py`."""
    return _quantize_reference.quantize(x, bits=bits, group=group, layout=layout, clip=clip)


def quantize_levels(
    x: torch.Tensor,
    *,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group: int,
    layout: Layout,
) -> Packed:
    """Entries [B,K,S,D] to the nearest of given levels; see `quantize/reference.py`."""
    return _quantize_reference.quantize_levels(
        x, levels=levels, scale=scale, zero=zero, bits=bits, group=group, layout=layout
    )


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Coded entries back to [B,K,S,D]; see `quantize/reference.py`."""
    return _quantize_reference.dequantize(packed, dtype)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., n] to bit planes [..., n·bits/8]; see `packing/reference.py`."""
    return _packing_reference.pack(codes, bits)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Bit planes [..., n·bits/8] to codes uint8 [..., n]; see `packing/reference.py`."""
    return _packing_reference.unpack(packed, bits, n)


def pack_trits(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..2 [..., n] to five a byte [..., ⌈n/5⌉]; see `packing/reference.py`."""
    return _packing_reference.pack_trits(codes)


def unpack_trits(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Five trits a byte [..., ⌈n/5⌉] to codes 0..2 [..., n]; see `packing/reference.py`."""
    return _packing_reference.unpack_trits(packed, n)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh–Hadamard transform of [..., D]; see `hadamard/reference.py`."""
    return _hadamard_reference.hadamard(x)
