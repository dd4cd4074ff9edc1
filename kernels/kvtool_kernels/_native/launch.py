"""From tensors to jobs: shapes, splits, memory for the compiled loops, and back to tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvtool_kernels._native import attention, decoding, encoding, team
from kvtool_kernels._native.record import (
    AT_ONCE,
    FIRST_SIDE,
    JOB,
    LANES,
    PASSES,
    THREAD,
    describe,
    laid_out,
    numbers,
    padded,
)
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.quantize.reference import affine
from kvtool_kernels.schedule import FIRST, HEAD, WORKER, stream_k

TILE = 64  # entries of a tile, or one group where that is larger
SPLIT, PIECE = 512, 1024  # entries of a share of the work: of attention at least, of decoding
SHARE = 4  # shares per thread, so that none waits long for the last


def attend(
    q: torch.Tensor,
    keys: Packed | torch.Tensor,
    values: Packed | torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_packed/reference.py`, for readable sides (`record.readable`) and at least one entry and query. Logits
    before the soft cap go to `logits` fp32 [B,H,1,S], if given: for one token and up to AT_ONCE heads a group."""
    return attend_lanes(q, [(keys, values)], scale=scale, softcap=softcap, logits=logits)


def attend_lanes(
    q: torch.Tensor,
    lanes: Sequence[tuple[Packed | torch.Tensor, Packed | torch.Tensor]],
    *,
    scale: float,
    softcap: float | None,
    logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, of heads that stand one behind the other in lanes, each with entries of its own number and form;
    widths are alike."""
    sides = [(laid_out(keys), laid_out(values)) for keys, values in lanes]
    shapes = [shape_of(values) for _, values in sides]
    batch, query_heads, tokens, width = q.shape
    heads, value_width = sum([shape[0] for shape in shapes]), shapes[0][2]
    count = query_heads // heads * tokens
    passes = -(-count // AT_ONCE)
    rows = -(-count // passes)
    threads, tile = torch.get_num_threads(), max([tile_of(side) for pair in sides for side in pair])
    entries = batch * passes * sum([shape[0] * shape[1] for shape in shapes])
    workers = workers_for(entries, threads)
    deal = dealt(batch, tuple([(shape[0], -(-shape[1] // tile)) for shape in shapes]), passes, workers)
    groups, threads = batch * heads * passes, min(threads, workers)
    wide, value_wide = padded(width), padded(value_width)

    query = query_rows(q.reshape(batch, heads, count, width), passes * rows, wide, scale)
    room = tile * max(wide, value_wide) + LANES  # a tile's last vector may end behind it
    part, scratch = LANES + rows * LANES + rows * value_wide, 2 * (3 * room + LANES) + rows * tile
    sizes = [groups * rows * value_wide, deal.pieces * part, threads * scratch, groups * rows]
    out, parts, workspace, lse = numbers(sum(sizes)).split(sizes)  # whole vectors first: they stay aligned
    told: list[int] = []
    for (keys, values), shape in zip(sides, shapes, strict=True):
        told += [*describe(keys), *describe(values), shape[1]]
    job = np.zeros(
        FIRST_SIDE + len(told) + groups, dtype=np.int64
    )  # at the end: how many pieces of each group are done
    at = job.ctypes.data
    job[: FIRST_SIDE + len(told)] = [
        0, 0, workers, 0, 0, tile, 0, 0, out.data_ptr(), workspace.data_ptr(), 4 * scratch,
        passes, rows, query.data_ptr(), lse.data_ptr(), parts.data_ptr(), at + 8 * (FIRST_SIDE + len(told)),
        int(np.float32(softcap or 0.0).view(np.int32)), 0 if logits is None else logits.data_ptr(),
        at + 8 * FIRST_SIDE, *deal.at, *told,
    ]  # fmt: skip
    team.run(attention.function(), job, threads)
    shape = (batch, query_heads, tokens)
    out = out.view(batch, heads, passes * rows, value_wide)[:, :, :count, :value_width]
    lse = lse.view(batch, heads, passes * rows)[:, :, :count]
    return out.reshape(*shape, value_width).to(q.dtype), lse.reshape(shape)


def workers_for(entries: int, threads: int) -> int:
    """Into how many shares the work over so many entries is cut."""
    return max(1, min(SHARE * threads, entries // SPLIT)) if threads > 1 else 1


@dataclass(frozen=True)
class Deal:
    """How many pieces there are, the addresses of their table and of each worker's first, and the two tables."""

    pieces: int
    at: tuple[int, int]
    tables: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]


@functools.lru_cache(maxsize=64)
def dealt(batch: int, lanes: tuple[tuple[int, int], ...], passes: int, workers: int) -> Deal:
    """The pieces of lanes of (heads, tiles) each. They are the same from one step to the next, until a tile is full."""
    heads = sum(count for count, _ in lanes)
    firsts = np.cumsum([0, *(count for count, _ in lanes)])
    each = np.array([
        (number, row, head, ((row * heads) + firsts[number] + head) * passes + part, tiles)
        for row in range(batch) for number, (count, tiles) in enumerate(lanes)
        for head in range(count) for part in range(passes)
    ], dtype=np.int64)  # fmt: skip
    deal = stream_k(each[:, -1].tolist(), workers)
    starts = np.searchsorted(deal[:, WORKER], np.arange(workers + 1))
    table = np.ascontiguousarray(np.concatenate([each[deal[:, HEAD], :-1], deal[:, FIRST:]], axis=1))
    return Deal(len(table), (table.ctypes.data, starts.ctypes.data), (table, starts))


def dequantize(packed: Packed) -> torch.Tensor:
    """A readable side of at least one entry → x̂ fp32 [B,K,S,D]."""
    batch, heads = packed.codes.shape[:2]
    tokens, tile = packed.tokens, tile_of(packed)
    out, splits = numbers(batch, heads, tokens, packed.width), -(-tokens // PIECE)
    units = batch * heads * splits
    threads = min(torch.get_num_threads(), units)
    scratch = 3 * (tile * padded(packed.width) + LANES) + LANES
    workspace = numbers(threads * scratch)
    job = np.zeros(JOB, dtype=np.int64)
    job[:PASSES] = [
        0, 0, units, heads, tokens, tile, PIECE, splits, out.data_ptr(), workspace.data_ptr(), 4 * scratch
    ]  # fmt: skip
    side = laid_out(packed)
    fields = describe(side)
    job[FIRST_SIDE : FIRST_SIDE + len(fields)] = fields
    team.run(decoding.function(), job, threads)
    return out


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float) -> Packed:
    """As `quantize/reference.py`, for fp32 x [B,K,S,D] of at least one entry, whose channels are whole vectors and
    neighbours in memory."""
    batch, heads, tokens, width = x.shape
    token = layout == "token"
    shape = (batch, heads, tokens // group, width) if token else (batch, heads, tokens, width // group)
    codes = x.new_empty(*(shape if token else shape[:3]), (group if token else width) * bits // 8, dtype=torch.uint8)
    low, high = numbers(2, *shape)
    splits, tile = -(-tokens // PIECE), group if token else AT_ONCE
    units = batch * heads * splits
    threads, scratch = min(torch.get_num_threads(), units), 2 * tile * width
    workspace = numbers(threads * scratch)
    job = np.zeros(JOB, dtype=np.int64)
    job[:PASSES] = [
        0, 0, units, heads, tokens, tile, PIECE, splits, codes.data_ptr(), workspace.data_ptr(), 4 * scratch
    ]  # fmt: skip
    fields = [x.data_ptr(), *x.stride()[:3], width, group, token, low.data_ptr(), high.data_ptr(), bits]
    job[FIRST_SIDE : FIRST_SIDE + len(fields)] = fields
    team.run(encoding.ranges(), job, threads)
    scale, zero, flat = affine(low * clip, high * clip, bits)
    low, high = zero.float(), scale.float().masked_fill_(flat, torch.inf)  # x / ∞: code 0
    job[: THREAD + 1] = 0
    job[[encoding.LOW, encoding.HIGH]] = low.data_ptr(), high.data_ptr()
    team.run(encoding.function(), job, threads)
    return Packed(codes, scale, zero, bits, group, layout, width)


def shape_of(side: Packed | torch.Tensor) -> tuple[int, int, int]:
    """K, S and D."""
    if isinstance(side, Packed):
        return side.codes.shape[1], side.tokens, side.width
    return side.shape[1], side.shape[2], side.shape[3]


def tile_of(side: Packed | torch.Tensor) -> int:
    return max(TILE, side.group) if isinstance(side, Packed) and side.layout == "token" else TILE


def query_rows(q: torch.Tensor, rows: int, wide: int, scale: float) -> torch.Tensor:
    """q [B,K,·,D] times the scale as fp32 [B,K,rows,wide], with zeros where it ends."""
    scaled = q.float() * scale
    short, narrow = rows - q.shape[2], wide - q.shape[3]
    return torch.nn.functional.pad(scaled, (0, narrow, 0, short)) if short or narrow else scaled.contiguous()
