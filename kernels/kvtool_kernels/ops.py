"""Dispatch by device: the one place that callers import operations from.

CPU tensors take `<op>/cpu.py`, CUDA tensors `<op>/triton.py`, where these exist; everything else takes plain
PyTorch, which runs on any device.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from kvtool_kernels.attend import cpu as _attend_cpu
from kvtool_kernels.attend import reference as _attend_reference
from kvtool_kernels.attend_evict import cpu as _attend_evict_cpu
from kvtool_kernels.attend_evict import reference as _attend_evict_reference
from kvtool_kernels.attend_evict.reference import Evicted
from kvtool_kernels.attend_packed import cpu as _attend_packed_cpu
from kvtool_kernels.attend_packed import reference as _attend_packed_reference
from kvtool_kernels.attention_statistics import blocked as _statistics
from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.hadamard import reference as _hadamard_reference
from kvtool_kernels.latent import cpu as _latent_cpu
from kvtool_kernels.latent import reference as _latent_reference
from kvtool_kernels.merge import reference as _merge_reference
from kvtool_kernels.merge.reference import Partial
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.packing import reference as _packing_reference
from kvtool_kernels.prefill import reference as _prefill_reference
from kvtool_kernels.quantize import cpu as _quantize_cpu
from kvtool_kernels.quantize import reference as _quantize_reference
from kvtool_kernels.scoring import SOFTMAX, Scoring
from kvtool_kernels.select import reference as _select_reference

__all__ = [
    "attend",
    "attend_evict",
    "attend_latent",
    "attend_packed",
    "attend_ragged",
    "attend_scored",
    "attend_selected",
    "attention_statistics",
    "dequantize",
    "hadamard",
    "merge",
    "pack",
    "pack_trits",
    "page_scores",
    "quantize",
    "quantize_levels",
    "streaming_prefill",
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
    twin = _triton("attend") if q.is_cuda else _on_cpu(q, _attend_cpu, _attend_reference)
    return twin.attend(q, k, v, scale=scale, causal=causal, bias=bias, softcap=softcap)


def attend_scored(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one token over one segment with its log-sum-exp and its logits; see `attend/reference.py`."""
    if q.device.type == "cpu":
        return _attend_cpu.scored(q, k, v, scale=scale, softcap=softcap)
    made = attend(q, k, v, scale=scale, softcap=softcap)
    return *made, _attend_reference.logits(q, k, scale=scale, softcap=softcap)


def attend_evict(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor | None,
    *,
    scale: float,
    free: tuple[int, int],
    softcap: float | None = None,
    scoring: Scoring = SOFTMAX,
    nearest: bool = False,
) -> Evicted:
    """Attention of one token, after which the entry that it scores worst goes to the end of k and v, in
    place; see `attend_evict/reference.py`."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "free": free, "scoring": scoring, "nearest": nearest}
    if q.device.type == "cpu":
        return _attend_evict_cpu.attend_evict(q, k, v, before, **options)
    out, lse, seen = attend_scored(q, k, v, scale=scale, softcap=softcap)
    return _attend_evict_reference.evicted((out, lse), seen, q, k, v, before, **options)


def attend_ragged(
    q: torch.Tensor, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of heads that hold different numbers of entries, with its log-sum-exp; see `attend/reference.py`."""
    twin = _triton("attend") if q.is_cuda else _on_cpu(q, _attend_cpu, _attend_reference)
    return twin.ragged(q, k, v, scale=scale, softcap=softcap)


def merge(a: Partial, b: Partial) -> Partial:
    """Two partial results over disjoint entries → the result over both; see `merge/reference.py`."""
    return (_triton("merge") if a[0].is_cuda else _merge_reference).merge(a, b)


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
    twin = _triton("attention_statistics") if q.is_cuda else _statistics
    return twin.attention_statistics(
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
    twin = _triton("attend_packed") if q.is_cuda else _on_cpu(q, _attend_packed_cpu, _attend_packed_reference)
    return twin.attend_packed(q, keys, values, scale=scale, softcap=softcap)


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float = 1.0) -> Packed:
    """Entries [B,K,S,D] to affine codes with a range per group; see `quantize/reference.py`."""
    twin = _triton("quantize") if x.is_cuda else _on_cpu(x, _quantize_cpu, _quantize_reference)
    return twin.quantize(x, bits=bits, group=group, layout=layout, clip=clip)


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
    twin = _triton("quantize") if x.is_cuda else _quantize_reference
    return twin.quantize_levels(x, levels=levels, scale=scale, zero=zero, bits=bits, group=group, layout=layout)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Coded entries back to [B,K,S,D]; see `quantize/reference.py`."""
    codes = packed.codes
    twin = _triton("quantize") if codes.is_cuda else _on_cpu(codes, _quantize_cpu, _quantize_reference)
    return twin.dequantize(packed, dtype)


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
    return (_triton("hadamard") if x.is_cuda else _hadamard_reference).hadamard(x)


def attend_latent(
    q: torch.Tensor,
    z: Packed | torch.Tensor,
    basis: torch.Tensor | None,
    v: Packed | torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    scale: float,
    offset: torch.Tensor | None = None,
    interleaved: bool = False,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over keys rebuilt from latents, with its log-sum-exp; see `latent/reference.py`."""
    twin = _triton("latent") if q.is_cuda else _on_cpu(q, _latent_cpu, _latent_reference)
    return twin.attend_latent(
        q, z, basis, v, positions, cos, sin, scale=scale, offset=offset, interleaved=interleaved, softcap=softcap
    )


def streaming_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink: int,
    recent: int,
    scale: float,
    start: int = 0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over sinks and a sliding window, with its log-sum-exp; see `prefill/reference.py`."""
    twin = _triton("prefill") if q.is_cuda else _prefill_reference
    return twin.streaming_prefill(q, k, v, sink=sink, recent=recent, scale=scale, start=start, softcap=softcap)


def page_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """A bound of the logits of each page; see `select/reference.py`."""
    return _select_reference.page_scores(q, low, high)


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the listed entries, with its log-sum-exp; see `select/reference.py`."""
    twin = _triton("select") if q.is_cuda else _select_reference
    return twin.attend_selected(q, k, v, indices, scale=scale, softcap=softcap)


def _on_cpu(tensor: torch.Tensor, twin: ModuleType, reference: ModuleType) -> ModuleType:
    return twin if tensor.device.type == "cpu" else reference


def _triton(operation: str) -> Any:
    """The Triton twin; imported only where there is a GPU, because Triton is slow to import."""
    return importlib.import_module(f"kvtool_kernels.{operation}.triton")
