"""`streaming_prefill` on a GPU: a program per (block of rows, KV head) walks over the sinks, then over its window.

What lies between is never read, so that the time of a token does not grow with the length of the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtool_kernels.tiles import blocks, capped, channels_last, dot, finish, pad, store, weigh


@triton.jit  # type: ignore[untyped-decorator]
def streaming_prefill_kernel(
    q, k, v, out, lse, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    heads, group, tokens, entries, width, value_width, sink, recent, start, scale, softcap,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    token, head = row // group, kv_head * group + row % group
    real = token < tokens
    position = start + token
    channel, value_channel, step = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, N)
    queries = tl.load(
        q + batch * q_b + head[:, None] * q_h + token[:, None].to(tl.int64) * q_t + channel[None, :],
        mask=real[:, None] & (channel[None, :] < width),
        other=0.0,
    )
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    high = tl.minimum(entries, start + tl.minimum(tokens, (tl.program_id(0) * M + M - 1) // group + 1))
    low = tl.maximum(sink, start + tl.program_id(0) * M // group - recent + 1)
    sinks = tl.cdiv(tl.minimum(sink, high), N)
    blocks_seen = sinks + tl.cdiv(tl.maximum(high - low, 0), N)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for block in range(blocks_seen):
        first = tl.where(block < sinks, block * N, low + (block - sinks) * N)
        limit = tl.where(block < sinks, tl.minimum(sink, high), high)
        entry = first + step
        inside = entry < limit
        keys = tl.load(
            k + first.to(tl.int64) * k_s + (step[None, :] * k_s + channel[:, None]),
            mask=inside[None, :] & (channel[:, None] < width),
            other=0.0,
        )
        logits = capped(dot(queries, keys), scale, softcap)
        near = (entry[None, :] > position[:, None] - recent) | (entry < sink)[None, :]
        visible = inside[None, :] & real[:, None] & (entry[None, :] <= position[:, None]) & near
        weights, keep, top, total = weigh(tl.where(visible, logits, float("-inf")), top, total)
        values = tl.load(
            v + first.to(tl.int64) * v_s + (step[:, None] * v_s + value_channel[None, :]),
            mask=inside[:, None] & (value_channel[None, :] < value_width),
            other=0.0,
        )
        acc = acc * keep[:, None] + dot(weights.to(values.dtype), values)
    value, level = finish(acc, top, total)
    rows = (batch * heads + head) * tokens + token
    store(out, lse, value, level, 0, real, rows, value_width, DV)


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
    """As `reference.streaming_prefill`."""
    q, k, v = channels_last(q, k, v)
    batch, heads, tokens, width = q.shape
    kv_heads, entries, value_width = k.shape[1], k.shape[2], v.shape[-1]
    group = heads // kv_heads
    tile = blocks(group * tokens, max(width, value_width), q.dtype, entries=32)
    out, lse = q.new_empty(batch, heads, tokens, value_width), q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel():
        streaming_prefill_kernel[(triton.cdiv(group * tokens, tile["M"]), batch * kv_heads)](
            q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, group, tokens, entries, width, value_width, sink, min(recent, start + tokens), start, scale, softcap,
            D=pad(width), DV=pad(value_width), **tile,
        )  # fmt: skip
    return out, lse
