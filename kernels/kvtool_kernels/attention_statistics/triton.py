"""`attention_statistics` on a GPU: attention once, then its weights again for each kind of sum; never a T×T tensor.

The first pass stores each row's maximum and the inverse of its sum apart, so that weights come back right however
large the logits are. Column sums belong to a program per (block of entries, row cell), which adds no more than its own
rows. For the sums by distance, tiles that lie on one diagonal of the grid of tiles add up element by element: each
such program leaves one tile, whose diagonals PyTorch then sums. Nothing is added atomically, so that results repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtool_kernels.attention_statistics.reference import Summary
from kvtool_kernels.tiles import INTERPRETED, LN2, LOG2E, capped, channels_last, dot, pad, warps, weigh


@triton.jit
def load_rows(x, head, x_h, x_t, token, tokens, channel, width):
    """x [·,T,D] at one head and some tokens → [M,D], zeros beyond."""
    mask = (token < tokens)[:, None] & (channel < width)[None, :]
    return tl.load(x + head * x_h + token[:, None].to(tl.int64) * x_t + channel[None, :], mask=mask, other=0.0)


@triton.jit
def sees(row, entry, tokens, window):
    """Whether each row [M] sees each entry [N]."""
    visible = (entry[None, :] <= row[:, None]) & (row < tokens)[:, None]
    if window is not None:
        visible &= entry[None, :] > row[:, None] - window
    return visible


@triton.jit  # type: ignore[untyped-decorator]
def rows_kernel(
    q, k, v, sinks, out, lse, entropy, tops, inverses,
    q_h, q_t, k_h, k_t, v_h, v_t, out_h, out_t, group, tokens, width, scale, window, softcap,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    channel, step = tl.arange(0, D), tl.arange(0, N)
    queries = load_rows(q, head, q_h, q_t, row, tokens, channel, width)
    top = tl.full([M], float("-inf"), tl.float32)
    total, moment = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)  # Σ w and Σ w·(logit − top)
    acc = tl.zeros([M, D], tl.float32)
    low = 0
    if window is not None:
        low = tl.maximum(0, tl.program_id(0) * M - window + 1)
    for start in range(low, tl.minimum(tokens, (tl.program_id(0) + 1) * M), N):
        entry = start + step
        keys = load_rows(k, head // group, k_h, k_t, entry, tokens, channel, width)
        logits = capped(dot(queries, tl.trans(keys)), scale, softcap)
        visible = sees(row, entry, tokens, window)
        before, seen = top, total
        weights, keep, top, total = weigh(tl.where(visible, logits, float("-inf")), top, total)
        base = tl.where(top == float("-inf"), 0.0, top)
        drop = tl.where(seen == 0.0, base, before) - base
        moment = keep * (moment + seen * drop) + tl.sum(weights * (logits - base[:, None]), 1)
        values = load_rows(v, head // group, v_h, v_t, entry, tokens, channel, width)
        acc = acc * keep[:, None] + dot(weights.to(values.dtype), values)
    seen = total
    if sinks is not None:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - top)
    inside = row < tokens
    inverse = 1.0 / tl.where(inside, total, 1.0)
    level = tl.log2(tl.where(inside, total, 1.0))
    place = head * tokens + row
    tl.store(lse + place, (top + level) * LN2, mask=inside)
    tl.store(entropy + place, (level * seen - moment) * inverse * LN2, mask=inside)
    tl.store(tops + place, top, mask=inside)
    tl.store(inverses + place, inverse, mask=inside)
    at = out + head * out_h + row[:, None].to(tl.int64) * out_t + channel[None, :]
    value = (acc * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(at, value, mask=inside[:, None] & (channel < width)[None, :])


@triton.jit
def weights_of(
    q, keys, tops, inverses, head, q_h, q_t, row, entry, channel, tokens, width, scale, window, softcap
):  # fmt: skip
    """The normalised weights of rows [M] over the entries [N] of `keys` [N,D]."""
    queries = load_rows(q, head, q_h, q_t, row, tokens, channel, width)
    inside = row < tokens
    top = tl.load(tops + head * tokens + row, mask=inside, other=0.0)
    inverse = tl.load(inverses + head * tokens + row, mask=inside, other=0.0)
    logits = capped(dot(queries, tl.trans(keys)), scale, softcap)
    visible = sees(row, entry, tokens, window)
    return tl.exp2(tl.where(visible, logits - top[:, None], float("-inf"))) * inverse[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def columns_kernel(
    q, k, tops, inverses, columns, q_h, q_t, k_h, k_t, group, tokens, width, cells, each, scale, window, softcap,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    entry, channel = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, D)
    keys = load_rows(k, head // group, k_h, k_t, entry, tokens, channel, width)
    last = tokens
    if window is not None:
        last = tl.minimum(tokens, (tl.program_id(0) + 1) * N + window - 1)
    for cell in range(tl.program_id(1) * each, tl.minimum((tl.program_id(1) + 1) * each, cells)):
        wide = tl.cast(cell, tl.int64)
        low = ((wide * tokens + cells - 1) // cells).to(tl.int32)
        high = ((wide * tokens + tokens + cells - 1) // cells).to(tl.int32)  # rows of the cell: low … high − 1
        sums = tl.zeros([N], tl.float32)
        for first in range(tl.maximum(low, tl.program_id(0) * N), tl.minimum(high, last), M):
            row = first + tl.arange(0, M)
            weights = weights_of(
                q, keys, tops, inverses, head, q_h, q_t, row, entry, channel, tokens, width, scale, window, softcap
            )  # fmt: skip
            sums += tl.sum(tl.where((row < high)[:, None], weights, 0.0), 0)
        tl.store(columns + (head * cells + cell) * tokens + entry, sums, mask=entry < tokens)


@triton.jit  # type: ignore[untyped-decorator]
def distance_kernel(
    q, k, tops, inverses, tiles, q_h, q_t, k_h, k_t, group, tokens, width, late, scale, window, softcap,
    M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Σ over i of the tile of rows i·M … and entries (i − diagonal)·M …, for rows from `late` on."""
    head, diagonal = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel, step = tl.arange(0, D), tl.arange(0, M)
    sums = tl.zeros([M, M], tl.float32)
    for block in range(tl.maximum(diagonal, late // M), tl.cdiv(tokens, M)):
        row, entry = block * M + step, (block - diagonal) * M + step
        keys = load_rows(k, head // group, k_h, k_t, entry, tokens, channel, width)
        weights = weights_of(
            q, keys, tops, inverses, head, q_h, q_t, row, entry, channel, tokens, width, scale, window, softcap
        )  # fmt: skip
        sums += tl.where((row >= late)[:, None], weights, 0.0)
    place = (head * tl.num_programs(0) + diagonal) * M * M
    tl.store(tiles + place + step[:, None] * M + step[None, :], sums)


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
    """As the reference; `out` lies in memory as [T,H,D], which is what a projection reads."""
    q, k, v = channels_last(q, k, v)
    heads, tokens, width = q.shape
    group = heads // k.shape[0]
    size = 128 if INTERPRETED.value else blocks_of(q.dtype, width)
    tile = {"M": size, "D": pad(width), "num_warps": warps(8 if width <= 128 else 4), "num_stages": 2}
    blocks = triton.cdiv(tokens, size)
    out = q.new_empty(tokens, heads, width).transpose(0, 1)
    lse, entropy, tops, inverses = q.new_empty(4, heads, tokens, dtype=torch.float32)
    rows_kernel[(blocks, heads)](
        q, k, v, sink_logits, out, lse, entropy, tops, inverses,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
        group, tokens, width, scale, window, softcap, N=size, **tile,
    )  # fmt: skip
    columns = q.new_empty(heads, cells, tokens, dtype=torch.float32)
    shared = (*q.stride()[:2], *k.stride()[:2], group, tokens, width)
    each = max(1, cells * size // tokens)  # small cells go several to a program
    columns_kernel[(blocks, triton.cdiv(cells, each), heads)](
        q, k, tops, inverses, columns, *shared, cells, each, scale, window, softcap, N=size, **tile
    )  # fmt: skip
    diagonals = blocks if window is None else min(blocks, (window + size - 2) // size + 1)
    tiles = q.new_empty(heads, diagonals, size, size, dtype=torch.float32)
    distance_kernel[(diagonals, heads)](
        q, k, tops, inverses, tiles, *shared, first, scale, window, softcap, **tile
    )  # fmt: skip
    corner = inverses[:, 0].clone()  # the first row sees one entry, whose logit is the maximum
    return Summary(out, lse, columns, by_distance(tiles, tokens), entropy, corner)


def blocks_of(dtype: torch.dtype, width: int) -> int:
    """Rows and entries of a tile: what compiles without spills for every target; none was timed."""
    if dtype == torch.float32:
        return 32 if width <= 64 else 16
    return 64 if width <= 128 else 32


def by_distance(tiles: torch.Tensor, tokens: int) -> torch.Tensor:
    """tiles [H,n,M,M], the element (r, c) of tile t at distance t·M + r − c → the sum of each distance [H,T].

    Read with a row stride one longer than the rows are, diagonals are columns; zeros on the left of each row keep
    neighbours apart.
    """
    heads, count, size, _ = tiles.shape
    padded = torch.nn.functional.pad(torch.nn.functional.pad(tiles, (size, 0)).flatten(2), (0, size))
    skew = padded.as_strided((heads, count, size, 2 * size), (*padded.stride()[:2], 2 * size + 1, 1))
    sums = skew.sum(2).flip(-1)  # tile t at distances (t − 1)·M + 1 … (t + 1)·M
    whole = tiles.new_zeros(heads, count + 1, size)
    whole[:, :count] += sums[..., :size]
    whole[:, 1:] += sums[..., size:]
    flat = whole.flatten(1)[:, size - 1 :][:, :tokens]
    return torch.nn.functional.pad(flat, (0, tokens - flat.shape[1]))
