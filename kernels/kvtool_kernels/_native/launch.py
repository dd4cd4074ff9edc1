"""From tensors to jobs: shapes, splits, memory for the compiled loops, and back to tensors."""

from __future__ import annotations

import numpy as np
import torch

from kvtool_kernels._native import attention, decoding, team
from kvtool_kernels._native.record import FIRST_SIDE, JOB, LANES, PASSES, describe, laid_out, padded
from kvtool_kernels.packed import Packed

ROWS = 4  # query rows at a time
TILE = 64  # entries of a tile, or one group where that is larger
SPLIT, PIECE = 512, 1024  # entries of a unit of work: of attention at least, of decoding
SHARE = 4  # units per thread, so that none waits long for the last


def attend(
    q: torch.Tensor,
    keys: Packed | torch.Tensor,
    values: Packed | torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_packed/reference.py`, for readable sides (`record.readable`) and at least one entry and query."""
    keys, values = laid_out(keys), laid_out(values)
    heads, entries, value_width = _shape(values)
    batch, query_heads, tokens, width = q.shape
    count = query_heads // heads * tokens
    passes = -(-count // ROWS)
    rows = -(-count // passes)
    groups, threads, tile = batch * heads * passes, torch.get_num_threads(), max(_tile(keys), _tile(values))
    splits = max(1, min(-(-SHARE * threads // groups), entries // SPLIT))
    chunk = -(-entries // (splits * tile)) * tile
    splits = -(-entries // chunk)
    threads = min(threads, groups * splits)
    wide, value_wide = padded(width), padded(value_width)

    query = _query(q.reshape(batch, heads, count, width), passes * rows, wide, scale)
    room = tile * max(wide, value_wide)
    part, scratch = LANES + rows * LANES + rows * value_wide, 2 * (3 * room + LANES) + rows * tile
    sizes = [groups * rows * value_wide, groups * splits * part, threads * scratch, groups * rows]
    out, parts, workspace, lse = torch.empty(sum(sizes)).split(sizes)  # whole vectors first: they stay aligned
    job = np.zeros(JOB + groups, dtype=np.int64)  # behind the job: how many splits of each group are done
    job[:JOB] = [
        0, 0, groups * splits, heads, entries, tile, chunk, splits, out.data_ptr(), workspace.data_ptr(), 4 * scratch,
        passes, rows, query.data_ptr(), lse.data_ptr(), parts.data_ptr(), job.ctypes.data + 8 * JOB,
        int(np.float32(softcap or 0.0).view(np.int32)), *describe(keys), *describe(values),
    ]  # fmt: skip
    team.run(attention.function(), job, threads)
    shape = (batch, query_heads, tokens)
    out = out.view(batch, heads, passes * rows, value_wide)[:, :, :count, :value_width]
    lse = lse.view(batch, heads, passes * rows)[:, :, :count]
    return out.reshape(*shape, value_width).to(q.dtype), lse.reshape(shape)


def dequantize(packed: Packed) -> torch.Tensor:
    """A readable side of at least one entry → x̂ fp32 [B,K,S,D]."""
    batch, heads = packed.codes.shape[:2]
    tokens, tile = packed.tokens, _tile(packed)
    out, splits = torch.empty(batch, heads, tokens, packed.width), -(-tokens // PIECE)
    units = batch * heads * splits
    threads = min(torch.get_num_threads(), units)
    scratch = 3 * tile * padded(packed.width) + LANES
    workspace = torch.empty(threads * scratch)
    job = np.zeros(JOB, dtype=np.int64)
    job[:PASSES] = [
        0, 0, units, heads, tokens, tile, PIECE, splits, out.data_ptr(), workspace.data_ptr(), 4 * scratch
    ]  # fmt: skip
    side = laid_out(packed)
    fields = describe(side)
    job[FIRST_SIDE : FIRST_SIDE + len(fields)] = fields
    team.run(decoding.function(), job, threads)
    return out


def _shape(side: Packed | torch.Tensor) -> tuple[int, int, int]:
    """K, S and D."""
    if isinstance(side, Packed):
        return side.codes.shape[1], side.tokens, side.width
    return side.shape[1], side.shape[2], side.shape[3]


def _tile(side: Packed | torch.Tensor) -> int:
    return max(TILE, side.group) if isinstance(side, Packed) and side.layout == "token" else TILE


def _query(q: torch.Tensor, rows: int, wide: int, scale: float) -> torch.Tensor:
    """q [B,K,·,D] times the scale as fp32 [B,K,rows,wide], with zeros where it ends."""
    scaled = q.float() * scale
    short, narrow = rows - q.shape[2], wide - q.shape[3]
    return torch.nn.functional.pad(scaled, (0, narrow, 0, short)) if short or narrow else scaled.contiguous()
