"""`attend_packed` on a GPU: as the dense kernel, with the codes turned into numbers on the way to the tensor cores.

What is shared along the summed index cannot leave a product; what is not, can. So a scale is applied

    TILE      to q before the keys' product, to the product of the values: one scale per channel for the whole block
              of entries (layout "token" with a block inside a group, or one static range for all entries);
    ENTRY     to the logits of the keys, to the weights of the values: one scale per entry;
    ELEMENT   to each code: several scales per entry (layout "channel", group < D), or groups smaller than a block.

In TILE and ENTRY the codes enter the product as they are, exactly. With fp16 queries |q · scale| must fit fp16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvtool_kernels.codes import arguments, load_levels, load_scale
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize.triton import dequantize
from kvtool_kernels.tiles import (
    INTERPRETED,
    INTERPRETED_TILE,
    Partials,
    capped,
    channels_last,
    dot,
    finish,
    pad,
    store,
    warps,
    weigh,
)

DENSE = tl.constexpr(0)
TILE = tl.constexpr(1)
ENTRY = tl.constexpr(2)
ELEMENT = tl.constexpr(3)


@triton.jit  # type: ignore[untyped-decorator]
def packed_logits(
    q, k, k_s, scale, scale_s, zero, zero_s, levels, start, step, inside, channel,
    MODE: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, TOKEN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """q [M,D] times the keys of N entries → fp32 [M,N]."""
    real = channel < WIDTH
    mask = inside[None, :] & real[:, None]
    if MODE == DENSE:
        keys = tl.load(k + tl.cast(start, tl.int64) * k_s + (step[None, :] * k_s + channel[:, None]), mask, 0.0)
        logits = dot(q, keys.to(q.dtype))
    else:
        SHARED: tl.constexpr = GROUP if TOKEN else 1  # entries with one scale
        CENTRE: tl.constexpr = 1 << (BITS - 1) if levels is None else 0
        levelled = load_levels(
            k, k_s, levels, start, step[None, :], channel[:, None], mask, WIDTH, GROUP, TOKEN, BITS, CENTRE
        )  # fmt: skip
        part = channel if TOKEN else channel // GROUP
        if MODE == TILE:
            factor, offset = load_scale(scale, scale_s, zero, zero_s, start, 0, part, real, SHARED, CENTRE)
            logits = dot((q.to(tl.float32) * factor[None, :]).to(q.dtype), levelled.to(q.dtype))
            logits += tl.sum(q.to(tl.float32) * offset[None, :], 1)[:, None]
        elif MODE == ENTRY:
            factor, offset = load_scale(scale, scale_s, zero, zero_s, start, step, 0, inside, 1, CENTRE)
            logits = dot(q, levelled.to(q.dtype)) * factor[None, :]
            logits += tl.sum(q.to(tl.float32), 1)[:, None] * offset[None, :]
        else:
            factor, offset = load_scale(
                scale, scale_s, zero, zero_s, start, step[None, :], part[:, None], mask, SHARED, CENTRE
            )  # fmt: skip
            logits = dot(q, (levelled * factor + offset).to(q.dtype))
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def packed_sums(
    weights, dtype: tl.constexpr, v, v_s, scale, scale_s, zero, zero_s, levels, start, step, inside, channel,
    MODE: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, TOKEN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """weights fp32 [M,N] times the values of N entries → fp32 [M,D]."""
    real = channel < WIDTH
    mask = inside[:, None] & real[None, :]
    rounded = weights.to(dtype)
    if MODE == DENSE:
        values = tl.load(v + tl.cast(start, tl.int64) * v_s + (step[:, None] * v_s + channel[None, :]), mask, 0.0)
        sums = dot(rounded, values.to(dtype))
    else:
        SHARED: tl.constexpr = GROUP if TOKEN else 1  # entries with one scale
        CENTRE: tl.constexpr = 1 << (BITS - 1) if levels is None else 0
        levelled = load_levels(
            v, v_s, levels, start, step[:, None], channel[None, :], mask, WIDTH, GROUP, TOKEN, BITS, CENTRE
        )  # fmt: skip
        part = channel if TOKEN else channel // GROUP
        if MODE == TILE:
            factor, offset = load_scale(scale, scale_s, zero, zero_s, start, 0, part, real, SHARED, CENTRE)
            total = tl.sum(rounded.to(tl.float32), 1)  # of the same weights as the codes', so that errors cancel
            sums = dot(rounded, levelled.to(dtype)) * factor[None, :] + total[:, None] * offset[None, :]
        elif MODE == ENTRY:
            factor, offset = load_scale(scale, scale_s, zero, zero_s, start, step, 0, inside, 1, CENTRE)
            sums = dot((weights * factor[None, :]).to(dtype), levelled.to(dtype))
            sums += tl.sum(weights * offset[None, :], 1)[:, None]
        else:
            factor, offset = load_scale(
                scale, scale_s, zero, zero_s, start, step[:, None], part[None, :], mask, SHARED, CENTRE
            )  # fmt: skip
            sums = dot(rounded, (levelled * factor + offset).to(dtype))
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def attend_packed_kernel(
    q, out, lse, q_b, q_h, q_t,
    k, k_b, k_h, k_s, k_scale, k_scale_b, k_scale_h, k_scale_s, k_zero, k_zero_b, k_zero_h, k_zero_s, k_levels,
    v, v_b, v_h, v_s, v_scale, v_scale_b, v_scale_h, v_scale_s, v_zero, v_zero_b, v_zero_h, v_zero_s, v_levels,
    heads, group, tokens, entries, chunk, scale, softcap,
    K_MODE: tl.constexpr, K_WIDTH: tl.constexpr, K_GROUP: tl.constexpr, K_TOKEN: tl.constexpr, K_BITS: tl.constexpr,
    V_MODE: tl.constexpr, V_WIDTH: tl.constexpr, V_GROUP: tl.constexpr, V_TOKEN: tl.constexpr, V_BITS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    token, head = row // group, kv_head * group + row % group
    real = token < tokens
    channel, value_channel = tl.arange(0, D), tl.arange(0, DV)
    queries = tl.load(
        q + batch * q_b + head[:, None] * q_h + token[:, None].to(tl.int64) * q_t + channel[None, :],
        mask=real[:, None] & (channel[None, :] < K_WIDTH),
        other=0.0,
    )
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    if K_MODE != DENSE:
        k_scale += batch * k_scale_b + kv_head * k_scale_h
        if k_zero is not None:
            k_zero += batch * k_zero_b + kv_head * k_zero_h
    if V_MODE != DENSE:
        v_scale += batch * v_scale_b + kv_head * v_scale_h
        if v_zero is not None:
            v_zero += batch * v_zero_b + kv_head * v_zero_h
    low = tl.program_id(2) * chunk
    high = tl.minimum(low + chunk, entries)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for start in range(low, high, N):
        step = tl.arange(0, N)
        inside = start + step < high
        product = packed_logits(
            queries, k, k_s, k_scale, k_scale_s, k_zero, k_zero_s, k_levels, start, step, inside, channel,
            K_MODE, K_WIDTH, K_GROUP, K_TOKEN, K_BITS,
        )  # fmt: skip
        logits = tl.where(inside[None, :] & real[:, None], capped(product, scale, softcap), float("-inf"))
        weights, keep, top, total = weigh(logits, top, total)
        acc = acc * keep[:, None] + packed_sums(
            weights, queries.dtype, v, v_s, v_scale, v_scale_s, v_zero, v_zero_s, v_levels, start, step, inside,
            value_channel, V_MODE, V_WIDTH, V_GROUP, V_TOKEN, V_BITS,
        )  # fmt: skip
    value, level = finish(acc, top, total)
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * group * tokens
    rows = (batch * heads + head) * tokens + token
    store(out, lse, value, level, part, real, rows, V_WIDTH, DV)


@dataclass(frozen=True)
class Side:
    """One side as the kernel takes it: pointers with strides, and what the program is compiled for."""

    arguments: tuple[torch.Tensor | int | None, ...]
    mode: int
    width: int
    group: int = 1
    token: bool = False
    bits: int = 0

    def compiled(self, letter: str) -> dict[str, int | bool]:
        named = {"MODE": self.mode, "WIDTH": self.width, "GROUP": self.group, "TOKEN": self.token, "BITS": self.bits}
        return {f"{letter}_{name}": value for name, value in named.items()}


def side(x: Packed | torch.Tensor, batch: int, block: int) -> Side:
    """`block` entries are read at a time."""
    if isinstance(x, torch.Tensor):
        (x,) = channels_last(x)
        return Side((x, *x.stride()[:3], *(None, 0, 0, 0) * 2, None), DENSE.value, x.shape[-1])
    token = x.layout == "token"
    static = not token and x.scale.shape[2] == 1 and (x.zero is None or x.zero.shape[2] == 1)
    if static or (token and block <= x.group):
        mode = TILE
    else:
        mode = ENTRY if not token and x.group == x.width else ELEMENT
    return Side(arguments(x, batch), mode.value, x.width, x.group, token, x.bits)


def packed_blocks(rows: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """As `tiles.blocks`; unpacking takes registers, so that tiles are smaller than over dense entries.

    What still spills: fp32 queries of more than 128 channels, over codes of several planes or levels with a scale per
    few channels.
    """
    small = dtype == torch.float32 or width > 128
    tall, wide = (16, 16) if small else (32, 32)
    if INTERPRETED.value:
        tall, wide = INTERPRETED_TILE
    high = max(16, min(tall, triton.next_power_of_2(rows)))
    return {"M": high, "N": wide, "num_warps": warps(8), "num_stages": 1 if small or high > 16 else 2}


def attend_packed(
    q: torch.Tensor,
    keys: Packed | torch.Tensor,
    values: Packed | torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.attend_packed`; what has outliers is decoded before."""
    (q,) = channels_last(q)
    keys, values = (
        dequantize(x, q.dtype) if isinstance(x, Packed) and x.outliers is not None else x for x in (keys, values)
    )
    batch, heads, tokens, width = q.shape
    kv_heads, entries = (
        (keys.shape[1], keys.shape[2]) if isinstance(keys, torch.Tensor) else (keys.codes.shape[1], keys.tokens)
    )
    value_width = values.shape[-1] if isinstance(values, torch.Tensor) else values.width
    if entries == 0:
        return q.new_zeros(batch, heads, tokens, value_width), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    group = heads // kv_heads
    tile = packed_blocks(group * tokens, max(width, value_width), q.dtype)
    groups = [x.group for x in (keys, values) if isinstance(x, Packed) and x.layout == "token" and x.group >= 32]
    if tile["M"] <= 16 and groups:  # few rows: scaling them costs less than scaling the codes
        tile["N"] = min(tile["N"], *groups)
    grid = triton.cdiv(group * tokens, tile["M"]), batch * kv_heads
    parts = Partials(q, value_width, grid[0] * grid[1], entries, tile["N"])
    if parts.rows:
        k, v = side(keys, batch, tile["N"]), side(values, batch, tile["N"])
        attend_packed_kernel[(*grid, parts.splits)](
            q, parts.out, parts.lse, *q.stride()[:3], *k.arguments, *v.arguments,
            heads, group, tokens, entries, parts.chunk, scale, softcap,
            **k.compiled("K"), **v.compiled("V"), D=pad(width), DV=pad(value_width), **tile,
        )  # fmt: skip
    return parts.merged()
