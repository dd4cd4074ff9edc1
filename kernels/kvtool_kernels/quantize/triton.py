"""`quantize`, `quantize_levels` and `dequantize` on a GPU, bit for bit as the definition.

Ranges are a reduction, one program per block of groups; scales are few and are rounded by plain PyTorch, as the
definition does; then one program per block of bytes finds the codes of each byte and packs them, reading the values
where they lie. Division is IEEE's, products and sums are not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtool_kernels.codes import arguments, load_levels, load_scale
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.packing.reference import planes
from kvtool_kernels.quantize.reference import TOKEN_GROUPS, restored
from kvtool_kernels.tiles import INTERPRETED, pad

EVEN = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds small numbers to the nearest integer, half to even
LANES = 65536 if INTERPRETED.value else 2048  # values that a program holds


@triton.jit  # type: ignore[untyped-decorator]
def range_kernel(
    x, low, high, x_b, x_h, x_s, heads, groups, width,
    TOKEN: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Minimum and maximum of the groups of one (batch, head): x [B,K,S,D] → low, high [B,K,groups]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    member = tl.arange(0, PADDED)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    if TOKEN:  # a row is (group of entries, channel)
        entry = (row // width * GROUP)[:, None] + member[None, :]
        channel = (row % width)[:, None]
    else:  # a row is (entry, group of channels)
        entry = (row // (width // GROUP))[:, None]
        channel = (row % (width // GROUP) * GROUP)[:, None] + member[None, :]
    inside = (row < groups)[:, None] & (member < GROUP)[None, :]
    value = tl.load(x + batch * x_b + head * x_h + entry.to(tl.int64) * x_s + channel, mask=inside, other=0.0)
    value = value.to(tl.float32)
    place = tl.program_id(1).to(tl.int64) * groups + row
    tl.store(low + place, tl.min(tl.where(inside, value, float("inf")), 1), mask=row < groups)
    tl.store(high + place, tl.max(tl.where(inside, value, float("-inf")), 1), mask=row < groups)


@triton.jit  # type: ignore[untyped-decorator]
def code_of(value, middles, TOP: tl.constexpr):
    """The code of each value: rounded, or the number of middles below it."""
    if middles is None:
        return (tl.minimum(tl.maximum(value, 0.0), TOP) + EVEN - EVEN).to(tl.int32)
    else:
        code = tl.zeros_like(value).to(tl.int32)
        for index in range(TOP):
            code += (value > tl.load(middles + index)).to(tl.int32)
        return code


@triton.jit  # type: ignore[untyped-decorator]
def encode_kernel(
    x, scale, zero, middles, codes,
    x_b, x_h, x_s, scale_b, scale_h, scale_s, scale_c, zero_b, zero_h, zero_s, zero_c, heads, runs, width,
    TOKEN: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr,
    POWER: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One plane of the runs of one (batch, head): x [B,K,S,D] → codes [B,K,runs,RUN·BITS/8]."""
    TAKEN: tl.constexpr = BITS & (16 - 2 * POWER)  # the bits that larger planes hold
    LENGTH: tl.constexpr = RUN * POWER // 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PADDED)
    inside = (row < runs)[:, None] & (lane < LENGTH)[None, :]
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    x += batch * x_b + head * x_h
    scale += batch * scale_b + head * scale_h
    if zero is not None:
        zero += batch * zero_b + head * zero_h
    byte = tl.zeros([ROWS, PADDED], tl.int32)
    for part in tl.static_range(8 // POWER):
        index = part * LENGTH + lane
        if TOKEN:  # a run is (group of entries, channel)
            group, channel = row // width, row % width
            entry = (group * GROUP)[:, None] + index[None, :]
            place, column, position = group[:, None].to(tl.int64), channel[:, None], channel[:, None]
        else:  # a run is an entry
            entry, position = row[:, None], index[None, :]
            place, column = entry.to(tl.int64), position // GROUP
        value = tl.load(x + entry.to(tl.int64) * x_s + position, mask=inside, other=0.0).to(tl.float32)
        if zero is not None:
            value -= tl.load(zero + place * zero_s + column * zero_c, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + place * scale_s + column * scale_c, mask=inside, other=1.0).to(tl.float32)
        code = code_of(tl.div_rn(value, factor), middles, (1 << BITS) - 1)
        byte |= ((code >> TAKEN) & ((1 << POWER) - 1)) << (part * POWER)
    place = (tl.program_id(1).to(tl.int64) * runs + row)[:, None] * (RUN * BITS // 8) + RUN * TAKEN // 8 + lane[None, :]
    tl.store(codes + place, byte.to(tl.uint8), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(
    codes, codes_b, codes_h, codes_s, scale, scale_b, scale_h, scale_s, zero, zero_b, zero_h, zero_s, levels, out,
    heads, entries,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, TOKEN: tl.constexpr, BITS: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """N entries of one (batch, head): codes → out [B,K,S,D]."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    start, step, channel = tl.program_id(0) * N, tl.arange(0, N), tl.arange(0, D)
    mask = (start + step < entries)[:, None] & (channel < WIDTH)[None, :]
    value = load_levels(
        codes + batch * codes_b + head * codes_h, codes_s, levels, start, step[:, None], channel[None, :], mask,
        WIDTH, GROUP, TOKEN, BITS, 0,
    )  # fmt: skip
    part = channel if TOKEN else channel // GROUP
    scale += batch * scale_b + head * scale_h
    if zero is not None:
        zero += batch * zero_b + head * zero_h
    factor, offset = load_scale(
        scale, scale_s, zero, zero_s, start, step[:, None], part[None, :], mask, GROUP if TOKEN else 1, 0
    )  # fmt: skip
    place = (tl.program_id(1).to(tl.int64) * entries + start + step)[:, None] * WIDTH + channel[None, :]
    tl.store(out + place, (value * factor + offset).to(out.dtype.element_ty), mask=mask)


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float = 1.0) -> Packed:
    """As `reference.quantize`."""
    x, grouped = _checked(x, group, layout)
    low, high = (torch.empty(grouped, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        rows = max(1, LANES // pad(group))
        count = low[0, 0].numel()
        range_kernel[(triton.cdiv(count, rows), x.shape[0] * x.shape[1])](
            x, low, high, *x.stride()[:3], x.shape[1], count, x.shape[-1],
            TOKEN=layout == "token", GROUP=group, PADDED=triton.next_power_of_2(group), ROWS=rows,
        )  # fmt: skip
    low, high = low * clip, high * clip
    scale, zero = (high - low) / (2**bits - 1), low
    largest = torch.finfo(torch.float16).max
    fits = x.dtype == torch.float16 and bits > 1 and abs(clip) <= 1  # then nothing need be asked of the GPU
    small = fits or not x.numel() or bool((scale <= largest).all() and (zero.abs() <= largest).all())
    scale, zero = (t.to(torch.float16 if small else torch.bfloat16) for t in (scale, zero))
    flat = scale == 0
    zero = torch.where(flat, high.to(zero.dtype), zero)
    codes = _encode(x, scale.masked_fill(flat, torch.inf), zero, None, bits, group, layout)  # x / ∞: code 0
    return Packed(codes, scale.masked_fill(flat, 1.0), zero, bits, group, layout, x.shape[-1])


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
    """As `reference.quantize_levels`."""
    if levels.shape != (2**bits,):
        raise ValueError(f"{bits} bits take {2**bits} levels, not a tensor of shape {list(levels.shape)}")
    x, _ = _checked(x, group, layout)
    codes = _encode(x, scale, zero, (levels[1:] + levels[:-1]) / 2, bits, group, layout)
    return Packed(codes, scale, zero, bits, group, layout, x.shape[-1], levels)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As `reference.dequantize`."""
    batch, heads = packed.codes.shape[:2]
    out = torch.empty(batch, heads, packed.tokens, packed.width, dtype=dtype, device=packed.codes.device)
    if out.numel():
        width = triton.next_power_of_2(packed.width)
        block = max(1, LANES // width)
        dequantize_kernel[(triton.cdiv(packed.tokens, block), batch * heads)](
            *arguments(packed, batch), out, heads, packed.tokens,
            WIDTH=packed.width, GROUP=packed.group, TOKEN=packed.layout == "token", BITS=packed.bits, N=block, D=width,
            enable_fp_fusion=False,
        )  # fmt: skip
    return restored(out, packed)


def _checked(x: torch.Tensor, group: int, layout: Layout) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """x with neighbouring channels, and the shape of its scales."""
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    if layout == "token":
        if group not in TOKEN_GROUPS or tokens % group:
            raise ValueError(f"{tokens} entries do not make groups of {group}; groups are {TOKEN_GROUPS}")
        return x, (batch, heads, tokens // group, width)
    if width % group or width % 8:
        raise ValueError(f"{width} channels do not make groups of {group}, or are no multiple of 8")
    return x, (batch, heads, tokens, width // group)


def _encode(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    middles: torch.Tensor | None,
    bits: int,
    group: int,
    layout: Layout,
) -> torch.Tensor:
    batch, heads, tokens, width = x.shape
    token = layout == "token"
    run = group if token else width
    shape = (batch, heads, tokens // group, width) if token else (batch, heads, tokens, width // group)
    codes = torch.empty(*(shape if token else shape[:3]), run * bits // 8, dtype=torch.uint8, device=x.device)
    scale = scale.expand(shape)
    zero = None if zero is None else zero.expand(shape)
    runs = codes[0, 0].numel() // codes.shape[-1] if codes.numel() else 0
    for power in planes(bits) if runs else ():
        padded = triton.next_power_of_2(run * power // 8)
        rows = max(1, LANES // padded // 4)
        encode_kernel[(triton.cdiv(runs, rows), batch * heads)](
            x, scale, zero, middles, codes, *x.stride()[:3], *scale.stride(),
            *(zero.stride() if zero is not None else (0,) * 4), heads, runs, width,
            TOKEN=token, GROUP=group, RUN=run, BITS=bits, POWER=power, PADDED=padded, ROWS=rows,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes
