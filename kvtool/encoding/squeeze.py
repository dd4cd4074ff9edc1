"""Codes on disk: what a codec packed into bytes for attention, each channel with frequencies of its own.

    squeezed(codec, parts) → parts, packed codes as `Codes` where that is shorter;   expanded(codes) → packed codes

It is exact, whatever the codec. A row of the stream is one channel of one head: all its codes, in the order of its
entries. Scales and all else stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.encoding.codecs import Codec, Parts
from kvtool.encoding.entropy import Stream, compressed, restored
from kvtool.records import Record
from kvtool_kernels.ops import pack, unpack


@dataclass(frozen=True)
class Codes(Record):
    """Packed codes uint8 of this shape, the last axis being runs along `axis`: entries of a channel ("token"; the
    channels are the axis before), or channels of an entry ("channel")."""

    stream: Stream
    shape: tuple[int, ...]
    bits: int
    axis: str


def squeezed(codec: Codec, parts: Parts) -> dict[str, torch.Tensor | Codes]:
    """Parts [B,K,S,…] as a file holds them."""
    made: dict[str, torch.Tensor | Codes] = dict(parts)
    for name, (bits, axis) in codec.codes.items():
        short = of(parts[name], bits, axis)
        if short.stream.nbytes < parts[name].nbytes:
            made[name] = short
    return made


def of(packed: torch.Tensor, bits: int, axis: str) -> Codes:
    """Packed codes uint8 as a file holds them."""
    codes = unpack(packed.cpu(), bits, packed.shape[-1] * 8 // bits)
    rows = codes.movedim(_channels(axis), 2)
    return Codes(compressed(rows.flatten(3).flatten(0, 2)), tuple(packed.shape), bits, axis)


def expanded(part: Codes) -> torch.Tensor:
    """The packed codes, in host memory."""
    full = torch.Size((*part.shape[:-1], part.shape[-1] * 8 // part.bits))
    rows = torch.empty(full, device="meta").movedim(_channels(part.axis), 2).shape
    codes = restored(part.stream).reshape(rows).movedim(2, _channels(part.axis))
    return pack(codes.contiguous(), part.bits)


def _channels(axis: str) -> int:
    """The axis of unpacked codes that counts channels."""
    return -2 if axis == "token" else -1
