"""The definition of `quantize`, `quantize_levels` and `dequantize`; `packed.py` names the layouts.

Affine, per group of values x:

    s = (max − min) / (2^bits − 1),  zero = min      (max and min times `clip`), both rounded to the scale's dtype first
    code = round(clamp((x − zero) / s, 0, 2^bits − 1)),   x̂ = code · s + zero

With levels: code = the level nearest to (x − zero) / s, the lower one at a midpoint.
All arithmetic is fp32, round is half to even. Scales are fp16 unless a scale or a zero would overflow there; then they
are all bf16. A group whose scale rounds to zero is constant: s = 1, code 0, zero = max. Values that are not finite are
the caller's error.
"""

from __future__ import annotations

import torch

from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.packing.reference import pack, unpack

TOKEN_GROUPS = (8, 16, 32, 64, 128)


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float = 1.0) -> Packed:
    """x [B,K,S,D] → `Packed` affine codes. S is a multiple of `group` in layout "token", D in layout "channel"."""
    grouped = group_view(x, group, layout)
    scale, zero, flat = affine(grouped.amin(-1) * clip, grouped.amax(-1) * clip, bits)
    codes = ((grouped - zero.float()[..., None]) / scale.float()[..., None]).clamp(0, 2**bits - 1).round()
    codes = codes.masked_fill(flat[..., None], 0)
    return Packed(_pack(codes, bits, layout), scale, zero, bits, group, layout, x.shape[-1])


def affine(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranges fp32 → scales and zeros as they are stored, and which groups are constant."""
    scale, zero = (high - low) / (2**bits - 1), low
    largest = torch.finfo(torch.float16).max
    small = not scale.numel() or bool((scale <= largest).all() and (zero.abs() <= largest).all())
    scale, zero = (t.to(torch.float16 if small else torch.bfloat16) for t in (scale, zero))
    flat = scale == 0
    return scale.masked_fill(flat, 1.0), torch.where(flat, high.to(zero.dtype), zero), flat


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
    """x [B,K,S,D], levels fp32 [2^bits] ascending, scale and zero as `Packed` stores them → `Packed`."""
    if levels.shape != (2**bits,):
        raise ValueError(f"{bits} bits take {2**bits} levels, not a tensor of shape {list(levels.shape)}")
    grouped = group_view(x, group, layout)
    offset = 0.0 if zero is None else zero.float()[..., None]
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(((grouped - offset) / scale.float()[..., None]).contiguous(), middles)
    return Packed(_pack(codes, bits, layout), scale, zero, bits, group, layout, x.shape[-1], levels)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`Packed` → x̂ [B,K,S,D], computed in fp32 and rounded to `dtype`."""
    batch, heads = packed.codes.shape[:2]
    run = packed.group if packed.layout == "token" else packed.width
    codes = unpack(packed.codes, packed.bits, run)
    values = codes.float() if packed.levels is None else packed.levels[codes.int()]
    if packed.layout == "channel":
        values = values.unflatten(-1, (packed.width // packed.group, packed.group))
    values = values * packed.scale.float()[..., None]
    if packed.zero is not None:
        values = values + packed.zero.float()[..., None]
    if packed.layout == "token":
        values = values.transpose(-1, -2)
    return restored(values.reshape(batch, heads, packed.tokens, packed.width).to(dtype), packed)


def restored(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [B,K,S,D], with the outliers of `packed` in their places."""
    if packed.outliers is None:
        return x
    index, value = packed.outliers
    return x.scatter(-1, index.long(), value.to(x.dtype))


def group_view(x: torch.Tensor, group: int, layout: Layout) -> torch.Tensor:
    """x [B,K,S,D] → fp32 [B,K,S/g,D,g] (layout "token") or [B,K,S,D/g,g] (layout "channel")."""
    batch, heads, tokens, width = x.shape
    check(tokens, width, group, layout)
    if layout == "token":
        return x.float().reshape(batch, heads, tokens // group, group, width).transpose(-1, -2)
    return x.float().reshape(batch, heads, tokens, width // group, group)


def check(tokens: int, width: int, group: int, layout: Layout) -> None:
    """Entries of this shape can be grouped."""
    if layout == "token" and (group not in TOKEN_GROUPS or tokens % group):
        raise ValueError(f"{tokens} entries do not make groups of {group}; groups are {TOKEN_GROUPS}")
    if layout == "channel" and (width % group or width % 8):
        raise ValueError(f"{width} channels do not make groups of {group}, or are no multiple of 8")


def _pack(codes: torch.Tensor, bits: int, layout: Layout) -> torch.Tensor:
    return pack((codes if layout == "token" else codes.flatten(-2)).to(torch.uint8), bits)
