"""`attend_latent` on a GPU: a tile of keys is rebuilt and turned in registers, and serves the KV head's whole group.

A key's channels are rebuilt as two halves, first and second of each pair, so that turning them needs no exchange
between lanes; channels that do not turn make up the last pairs, at angle 0. Latents are read once for all heads of a
group; the basis is read for each tile of entries, from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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


@triton.jit  # type: ignore[untyped-decorator]
def pairs(index, half, width, INTERLEAVED: tl.constexpr):
    """The two channels of each pair; the pairs from `half` on are made of channels that do not turn."""
    if INTERLEAVED:
        return 2 * index, 2 * index + 1
    else:
        first = tl.where(index < half, index, half + index)
        return first, tl.where(index < half, half + index, width // 2 + index)


@triton.jit  # type: ignore[untyped-decorator]
def attend_latent_kernel(
    q, z, basis, offset, v, positions, cos, sin, out, lse,
    q_b, q_h, q_t, z_b, z_h, z_s, basis_h, basis_r, v_b, v_h, v_s, positions_b, positions_h, positions_s,
    heads, group, share, value_share, tokens, entries, width, rank, half, value_width, chunk, scale, softcap,
    OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, R: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    token, head = row // group, kv_head * group + row % group
    real = token < tokens
    index, value_channel = tl.arange(0, P), tl.arange(0, DV)
    one, two = pairs(index, half, width, INTERLEAVED)
    paired = index < width // 2
    place = q + batch * q_b + head[:, None] * q_h + token[:, None].to(tl.int64) * q_t
    q_one = tl.load(place + one[None, :], mask=real[:, None] & paired[None, :], other=0.0)
    q_two = tl.load(place + two[None, :], mask=real[:, None] & paired[None, :], other=0.0)
    latent_head, apart = kv_head // share, kv_head % share * width
    z += batch * z_b + latent_head * z_h
    v += batch * v_b + kv_head // value_share * v_h
    positions += batch * positions_b + kv_head * positions_h
    basis += latent_head * basis_h + apart
    base_one = tl.zeros([P], tl.float32)
    base_two = tl.zeros([P], tl.float32)
    if OFFSET:
        offset += latent_head * share * width + apart
        base_one += tl.load(offset + one, mask=paired, other=0.0)
        base_two += tl.load(offset + two, mask=paired, other=0.0)
    low = tl.program_id(2) * chunk
    high = tl.minimum(low + chunk, entries)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for start in range(low, high, N):
        entry = (start + tl.arange(0, N)).to(tl.int64)
        inside = entry < high
        k_one = tl.zeros([N, P], tl.float32) + base_one[None, :]
        k_two = tl.zeros([N, P], tl.float32) + base_two[None, :]
        for begin in range(0, rank, R):
            part = begin + tl.arange(0, R)
            latent = tl.load(
                z + entry[:, None] * z_s + part[None, :], mask=inside[:, None] & (part < rank)[None, :], other=0.0
            )
            at = basis + part[:, None] * basis_r
            both = (part < rank)[:, None] & paired[None, :]
            k_one += dot(latent, tl.load(at + one[None, :], mask=both, other=0.0).to(latent.dtype))
            k_two += dot(latent, tl.load(at + two[None, :], mask=both, other=0.0).to(latent.dtype))
        turn = tl.load(positions + entry * positions_s, mask=inside, other=0)[:, None] * half + index[None, :]
        turns = inside[:, None] & (index < half)[None, :]
        c = tl.load(cos + turn, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + turn, mask=turns, other=0.0).to(tl.float32)
        logits = dot(q_one, tl.trans((k_one * c - k_two * s).to(q_one.dtype)))
        logits += dot(q_two, tl.trans((k_two * c + k_one * s).to(q_one.dtype)))
        visible = inside[None, :] & real[:, None]
        logits = tl.where(visible, capped(logits, scale, softcap), float("-inf"))
        weights, keep, top, total = weigh(logits, top, total)
        values = tl.load(
            v + entry[:, None] * v_s + value_channel[None, :],
            mask=inside[:, None] & (value_channel < value_width)[None, :],
            other=0.0,
        )
        acc = acc * keep[:, None] + dot(weights.to(values.dtype), values)
    value, level = finish(acc, top, total)
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * group * tokens
    rows = (batch * heads + head) * tokens + token
    store(out, lse, value, level, part, real, rows, value_width, DV)


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
    """As `reference.attend_latent`; what is coded is decoded before."""
    z, v = (dequantize(side, q.dtype) if isinstance(side, Packed) else side.to(q.dtype) for side in (z, v))
    if basis is None:
        basis = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[None]
    q, z, basis, v = channels_last(q, z, basis, v)
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, width = q.shape
    shared, rank, share = z.shape[1], basis.shape[1], basis.shape[2] // width
    kv_heads, (entries, value_width) = shared * share, v.shape[2:]
    group = heads // kv_heads
    basis = basis.expand(shared, -1, -1)
    base = None if offset is None else offset.float().expand(shared, -1).contiguous()
    positions = positions.expand(batch, kv_heads, entries)
    tile = latent_blocks(group * tokens, max(width, value_width), q.dtype)
    grid = triton.cdiv(group * tokens, tile["M"]), batch * kv_heads
    parts = Partials(q, value_width, grid[0] * grid[1], entries, tile["N"])
    if parts.rows:
        attend_latent_kernel[(*grid, parts.splits)](
            q, z, basis, basis if base is None else base, v, positions, cos, sin, parts.out, parts.lse,
            *q.stride()[:3], *z.stride()[:3], *basis.stride()[:2], *v.stride()[:3], *positions.stride(),
            heads, group, share, kv_heads // v.shape[1], tokens, entries, width, rank, cos.shape[1], value_width,
            parts.chunk, scale, softcap,
            OFFSET=base is not None, INTERLEAVED=interleaved, P=pad(width // 2), DV=pad(value_width), **tile,
        )  # fmt: skip
    return parts.merged()


def latent_blocks(rows: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """As `tiles.blocks`, with R latent channels at a time; the rebuilt keys take registers of their own."""
    small = dtype == torch.float32 or width > 128
    tall, wide = (16, 16) if small else (32, 32)
    if INTERPRETED.value:
        tall, wide = INTERPRETED_TILE
    high = max(16, min(tall, triton.next_power_of_2(rows)))
    return {
        "M": high,
        "N": wide,
        "R": 16 if small else 32,
        "num_warps": warps(8 if width > 128 else 4),
        "num_stages": 2,
    }
