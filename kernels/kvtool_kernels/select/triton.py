"""`attend_selected` on a GPU: attention whose entries come from a list, read where they lie.

As the dense kernel with one more load; entries of one page are neighbours, so that reads stay wide. Scoring and
choosing pages are matrix products and a top-k, which plain PyTorch does on any device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtool_kernels.tiles import Partials, blocks, capped, channels_last, dot, finish, pad, store, warps, weigh


@triton.jit  # type: ignore[untyped-decorator]
def attend_selected_kernel(
    q, k, v, indices, out, lse, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, indices_b, indices_h, indices_m,
    heads, group, tokens, listed, width, value_width, chunk, scale, softcap,
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
        mask=real[:, None] & (channel[None, :] < width),
        other=0.0,
    )
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    indices += batch * indices_b + kv_head * indices_h
    low = tl.program_id(2) * chunk
    high = tl.minimum(low + chunk, listed)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for start in range(low, high, N):
        member = start + tl.arange(0, N)
        entry = tl.load(indices + member * indices_m, mask=member < high, other=-1).to(tl.int64)
        inside = entry >= 0
        keys = tl.load(
            k + entry[None, :] * k_s + channel[:, None],
            mask=inside[None, :] & (channel[:, None] < width),
            other=0.0,
        )
        visible = inside[None, :] & real[:, None]
        logits = tl.where(visible, capped(dot(queries, keys), scale, softcap), float("-inf"))
        weights, keep, top, total = weigh(logits, top, total)
        values = tl.load(
            v + entry[:, None] * v_s + value_channel[None, :],
            mask=inside[:, None] & (value_channel[None, :] < value_width),
            other=0.0,
        )
        acc = acc * keep[:, None] + dot(weights.to(values.dtype), values)
    value, level = finish(acc, top, total)
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * group * tokens
    rows = (batch * heads + head) * tokens + token
    store(out, lse, value, level, part, real, rows, value_width, DV)


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.attend_selected`."""
    q, k, v = channels_last(q, k, v)
    batch, heads, tokens, width = q.shape
    kv_heads, value_width, listed = k.shape[1], v.shape[-1], indices.shape[-1]
    group = heads // kv_heads
    tile = blocks(group * tokens, max(width, value_width), q.dtype, entries=32)
    tile |= {"num_warps": warps(8), "num_stages": 1 if q.dtype == torch.float32 else 2}  # addresses take registers
    grid = triton.cdiv(group * tokens, tile["M"]), batch * kv_heads
    parts = Partials(q, value_width, grid[0] * grid[1], listed, tile["N"])
    if parts.rows:
        attend_selected_kernel[(*grid, parts.splits)](
            q, k, v, indices, parts.out, parts.lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride(),
            heads, group, tokens, listed, width, value_width, parts.chunk, scale, softcap,
            D=pad(width), DV=pad(value_width), **tile,
        )  # fmt: skip
    return parts.merged()
