"""From the tensors of `attend_latent` to the job of `turning.py`, and back."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvtool_kernels._native import launch, team, turning
from kvtool_kernels._native.record import FIRST_SIDE, LANES, describe, laid_out, numbers, padded
from kvtool_kernels.packed import Packed


def attend(
    q: torch.Tensor,
    z: Packed | torch.Tensor,
    basis: torch.Tensor | None,
    v: Packed | torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    scale: float,
    offset: torch.Tensor | None,
    interleaved: bool,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `latent/reference.py`, for what `latent/cpu.py` says can be served."""
    z, v = laid_out(z), laid_out(v)
    (latents, entries, held), (value_latents, _, value_width) = launch.shape_of(z), launch.shape_of(v)
    batch, query_heads, tokens, width = q.shape
    shared = (held if basis is None else basis.shape[2]) // width
    heads = latents * shared
    own, unit = query_heads // heads * tokens, math.lcm(shared, heads // value_latents)
    units, rows, wide, value_wide = heads // unit, unit * own, padded(width), padded(value_width)
    tile = max(launch.tile_of(z), launch.tile_of(v))
    threads = torch.get_num_threads()
    workers = launch.workers_for(batch * units * entries, threads)
    deal = launch.dealt(batch, ((units, -(-entries // tile)),), 1, workers)
    threads = min(threads, workers)

    query = launch.query_rows(
        _paired(q, 2 * cos.shape[1], interleaved).reshape(batch, heads, own, width), own, wide, scale
    )
    basis, offset = (None if x is None else _widened(x.float(), width, wide) for x in (basis, offset))
    cos, sin, places = cos.float().contiguous(), sin.float().contiguous(), positions.long().contiguous()
    room = tile * max(padded(held), wide, value_wide) + LANES  # a tile's last vector may end behind it
    part, scratch = padded(rows) + rows * LANES + rows * value_wide, 2 * (3 * room + LANES) + 2 * room + rows * tile
    groups = batch * units
    sizes = [groups * rows * value_wide, deal.pieces * part, threads * scratch, groups * rows]
    out, parts, workspace, lse = numbers(sum(sizes)).split(sizes)  # whole vectors first: they stay aligned
    job = np.zeros(turning.JOB + groups, dtype=np.int64)  # at the end: how many pieces of each group are done
    job[:FIRST_SIDE] = [
        0, 0, workers, 0, 0, tile, 0, 0, out.data_ptr(), workspace.data_ptr(), 4 * scratch,
        0, rows, query.data_ptr(), lse.data_ptr(), parts.data_ptr(), job.ctypes.data + 8 * turning.JOB,
        int(np.float32(softcap or 0.0).view(np.int32)), 0, 0, *deal.at,
    ]  # fmt: skip
    job[FIRST_SIDE : turning.JOB] = [
        *describe(z), *describe(v),
        own, latents // units, value_latents // units, shared, wide,
        *((0,) * 3 if basis is None else (basis.shape[1], basis.data_ptr(), _step(basis))),
        *((0,) * 2 if offset is None else (offset.data_ptr(), _step(offset))),
        cos.data_ptr(), sin.data_ptr(), cos.shape[1], interleaved,
        places.data_ptr(), *(0 if n == 1 else s for n, s in zip(places.shape[:2], places.stride()[:2], strict=True)),
        entries, room,
    ]  # fmt: skip
    team.run(turning.function(), job, threads)
    shape = (batch, query_heads, tokens)
    return out.view(*shape, value_wide)[..., :value_width].to(q.dtype), lse.view(shape)


def _step(x: torch.Tensor) -> int:
    """Numbers from one latent to the next, of a map that may be all latents' own."""
    return 0 if len(x) == 1 else x.stride(0)


def _widened(x: torch.Tensor, width: int, wide: int) -> torch.Tensor:
    """[...,n·D] with whole vectors for each of the n."""
    if width != wide:
        x = torch.nn.functional.pad(x.unflatten(-1, (-1, width)), (0, wide - width)).flatten(-2)
    return x.contiguous()


def _paired(q: torch.Tensor, turned: int, interleaved: bool) -> torch.Tensor:
    """q [...,D] in the order of channels in which the loops leave keys: of 2·LANES neighbours firsts, then seconds."""
    whole = turned - turned % (2 * LANES)
    if not interleaved or not whole:
        return q
    pairs = q[..., :whole].unflatten(-1, (-1, LANES, 2)).transpose(-1, -2)
    return torch.cat([pairs.flatten(-3), q[..., whole:]], -1)
