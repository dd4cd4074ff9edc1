"""Attention over keys that are stored before RoPE, rebuilt from their written form as they are read.

    k̂_j = rotate(ẑ_j·M + c, position of j);   out = (Σ_j w_j ẑ_j of the values)·M_v + c_v

Kernels decode, rebuild and turn keys a few at a time, for all query heads of a group; values stay as they are written.
A side that kernels cannot read is decoded block by block. Shapes as in `coded.py`; n heads are joined in a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.encoding.encoding import Encoding
from kvtool_kernels.ops import attend_latent, merge
from kvtool_kernels.packed import Packed

if TYPE_CHECKING:
    from kvtool.cache.store.coded import Coded

ROWS = 64  # of queries per KV head; more of them are worth decoding for
BYTE = 8  # codes along channels fill whole bytes
Map = tuple[torch.Tensor | None, torch.Tensor | None]


def apply(coded: Coded, q: torch.Tensor, own: slice | None = None) -> bool:
    """Is this the way for q [B,H,T,D]? `own`: the queries are those of these KV heads only."""
    key, value = coded.key, coded.value
    if key.rotated or key.codec.mixes or value.codec.mixes or coded.slow or q.dtype == torch.float64:
        return False
    heads = _heads(coded)
    if own is not None:
        sides = zip((key, value), maps(coded), strict=True)
        if not all(side.joined == heads and back[0] is not None for side, back in sides):
            return False
        heads = own.stop - own.start
    return q.shape[1] // heads * q.shape[2] <= ROWS


def attend(coded: Coded, q: torch.Tensor, step: Step, own: slice | None = None) -> Partial:
    """As `Coded.attend`, of at least one entry."""
    rotary, (keys_back, values_back) = coded.rotary, maps(coded)
    assert rotary is not None
    if own is not None:
        keys_back, values_back = _of(keys_back, own, coded.width[0]), _of(values_back, own, coded.width[1])
    (basis, offset), done = keys_back, None
    for low, high, z, v in _pieces(coded):
        positions = coded.positions(low, high).to(q.device)
        cos, sin = rotary.rows(int(positions.max()) + 1, q.device)
        positions = positions.int().reshape(*[1] * (3 - positions.dim()), *positions.shape)
        made = attend_latent(
            q, z, basis, v, positions, cos, sin, offset=offset, interleaved=rotary.interleaved, **step.options
        )
        done = made if done is None else merge(done, made)
    assert done is not None
    heads = _heads(coded) if own is None else own.stop - own.start
    joined = coded.value.joined if own is None else heads
    return _turned_back(done[0], values_back, joined, coded.width[1], heads).to(q.dtype), done[1]


def maps(coded: Coded) -> tuple[Map, Map]:
    """M and c of keys and of values. They are the plan's own, or soon made anew: nothing but entries is held."""
    sides = zip((coded.key, coded.value), coded.width, strict=True)
    key, value = (_map(encoding, _heads(coded), width, coded.device) for encoding, width in sides)
    return key, value


def _heads(coded: Coded) -> int:
    return coded.key.joined * next(iter(coded.parts["key"].values())).shape[1]


def _map(encoding: Encoding, heads: int, width: int, device: torch.device) -> Map:
    matrix, offset = encoding.back(heads, width)
    rank = encoding.written(width)
    if matrix is None and rank % BYTE:  # codes are wider than what they stand for
        matrix = torch.eye(rank, dtype=torch.float32)[None]
    return None if matrix is None else matrix.to(device), None if offset is None else offset.to(device)


def _of(back: Map, own: slice, width: int) -> Map:
    """The heads `own` of a latent of all."""
    matrix, offset = (None if part is None else part[..., own.start * width : own.stop * width] for part in back)
    return matrix, offset


def _pieces(coded: Coded) -> Iterator[tuple[int, int, Packed | torch.Tensor, Packed | torch.Tensor]]:
    """(low, high, latents of keys, of values) of all entries at once, or of so many as are decoded at a time."""
    sides = (("key", coded.key, coded.width[0]), ("value", coded.value, coded.width[1]))
    key, value = (encoding.readable(coded.parts[side]) for side, encoding, _ in sides)
    if key is not None and value is not None:
        yield 0, coded.length, key, value
        return
    for low, high in coded.blocks():
        z, v = (encoding.latent(coded.cut(side, encoding, low, high), width) for side, encoding, width in sides)
        yield low, high, z, v


def _turned_back(out: torch.Tensor, back: Map, joined: int, width: int, heads: int) -> torch.Tensor:
    """Weighted means of ẑ [B,H,T,r] → of x̂ [B,H,T,D], D = `width`, for latents of `joined` of `heads` KV heads."""
    matrix, offset = back
    rows = out.float().reshape(len(out), heads // joined, joined, -1, out.shape[-1])
    if matrix is not None:
        rows = rows[..., : matrix.shape[1]] @ matrix.unflatten(-1, (joined, width)).transpose(1, 2)
    else:  # of the heads that lie side by side each row has its own
        rows = rows[..., : joined * width].unflatten(-1, (joined, width)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    if offset is not None:
        rows = rows + offset.unflatten(-1, (joined, width))[:, :, None]
    return rows.reshape(*out.shape[:3], width)
