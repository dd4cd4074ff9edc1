"""From tensors to jobs: shapes, splits, memory for the compiled loops, and back to tensors."""

from __future__ import annotations

import numpy as np
import torch

from kvtool_kernels._native import attention, decoding, encoding, team
from kvtool_kernels._native.record import AT_ONCE, FIRST_SIDE, JOB, LANES, PASSES, THREAD, describe, laid_out, padded
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.quantize.reference import affine

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
    logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_packed/reference.py`, for readable sides (`record.readable`) and at least one entry and query. Logits
    before the soft cap go to `logits` fp32 [B,H,1,S], if given: for one token and up to AT_ONCE heads a group."""
    keys, values = laid_out(keys), laid_out(values)
    heads, entries, value_width = _shape(values)
    batch, query_heads, tokens, width = q.shape
    count = query_heads // heads * tokens
    passes = -(-count // AT_ONCE)
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
        int(np.float32(softcap or 0.0).view(np.int32)), 0 if logits is None else logits.data_ptr(),
        *describe(keys), *describe(values),
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


def quantize(x: torch.Tensor, *, bits: int, group: int, layout: Layout, clip: float) -> Packed:
    """As `quantize/reference.py`, for fp32 x [B,K,S,D] of at least one entry, whose channels are whole vectors and
    neighbours in memory."""
    batch, heads, tokens, width = x.shape
    token = layout == "token"
    shape = (batch, heads, tokens // group, width) if token else (batch, heads, tokens, width // group)
    codes = torch.empty(*(shape if token else shape[:3]), (group if token else width) * bits // 8, dtype=torch.uint8)
    low, high = torch.empty(2, *shape)
    splits, tile = -(-tokens // PIECE), group if token else AT_ONCE
    units = batch * heads * splits
    threads, scratch = min(torch.get_num_threads(), units), 2 * tile * width
    workspace = torch.empty(threads * scratch)
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
