"""`attend` on a GPU: one program per (block of query rows, KV head, split of the entries).

A row is a query head of the KV head's group at one token, so each entry is read once for the whole group, also when
decoding. Short calls split the entries between programs until the GPU is full and merge by log-sum-exp; a causal
program ends at its last token's own entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvtool_kernels.attend import reference
from kvtool_kernels.tiles import LOG2E, Partials, blocks, capped, channels_last, dot, finish, pad, store, weigh


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(
    q, k, v, bias, out, lse,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, bias_b, bias_h, bias_t, bias_s,
    heads, group, tokens, entries, width, value_width, chunk, scale, softcap,
    CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
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
    low = tl.program_id(2) * chunk
    high = tl.minimum(low + chunk, entries)
    past = entries - tokens
    if CAUSAL:
        high = tl.minimum(high, past + (tl.program_id(0) * M + M - 1) // group + 1)
    step = tl.arange(0, N)
    k += batch * k_b + kv_head * k_h + low.to(tl.int64) * k_s
    v += batch * v_b + kv_head * v_h + low.to(tl.int64) * v_s
    if bias is not None:
        bias += batch * bias_b + low.to(tl.int64) * bias_s
        bias += head[:, None] * bias_h + token[:, None].to(tl.int64) * bias_t
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for start in range(low, high, N):
        entry = start + step
        inside = entry < high
        keys = tl.load(
            k + step[None, :] * k_s + channel[:, None],
            mask=inside[None, :] & (channel[:, None] < width),
            other=0.0,
        )
        logits = capped(dot(queries, keys), scale, softcap)
        visible = inside[None, :] & real[:, None]
        if bias is not None:
            logits += tl.load(bias + step[None, :] * bias_s, mask=visible, other=0.0) * LOG2E
            bias += N * bias_s
        if CAUSAL:
            visible &= entry[None, :] <= past + token[:, None]
        weights, keep, top, total = weigh(tl.where(visible, logits, float("-inf")), top, total)
        values = tl.load(
            v + step[:, None] * v_s + value_channel[None, :],
            mask=inside[:, None] & (value_channel[None, :] < value_width),
            other=0.0,
        )
        acc = acc * keep[:, None] + dot(weights.to(values.dtype), values)
        k += N * k_s
        v += N * v_s
    value, level = finish(acc, top, total)
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * group * tokens
    rows = (batch * heads + head) * tokens + token
    store(out, lse, value, level, part, real, rows, value_width, DV)


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
    """As `reference.attend`."""
    q, k, v = channels_last(q, k, v)
    batch, heads, tokens, width = q.shape
    kv_heads, entries, value_width = k.shape[1], k.shape[2], v.shape[-1]
    group = heads // kv_heads
    if bias is not None:
        bias = bias.expand(batch, heads, tokens, entries)
    tile = blocks(group * tokens, max(width, value_width), q.dtype, entries=64 if bias is None else 32)
    grid = triton.cdiv(group * tokens, tile["M"]), batch * kv_heads
    parts = Partials(q, value_width, grid[0] * grid[1], entries, tile["N"])
    if parts.rows:
        attend_kernel[(*grid, parts.splits)](
            q, k, v, bias, parts.out, parts.lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *(bias.stride() if bias is not None else (0,) * 4),
            heads, group, tokens, entries, width, value_width, parts.chunk, scale, softcap,
            CAUSAL=causal, D=pad(width), DV=pad(value_width), **tile,
        )  # fmt: skip
    return parts.merged()


def ragged(
    q: torch.Tensor, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.ragged`."""
    return reference.by_lane(attend, q, k, v, scale=scale, softcap=softcap)
