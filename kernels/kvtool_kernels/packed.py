"""One side (keys or values) of one segment in coded form: bit-packed codes with their scales.

    x̂ = level(code) · scale + zero,   but x̂[index] = value for an entry's n outliers

Layout "token" shares a scale between `group` consecutive entries of one channel:
codes uint8 [B,K,S/g,D,g·bits/8], scale and zero [B,K,S/g,D].
Layout "channel" shares it between `group` consecutive channels of one entry:
codes uint8 [B,K,S,D·bits/8], scale and zero broadcastable to [B,K,S,D/g] (S=1 there: one range for all entries).
Outliers int16 and fp16 [B,K,S,n] are the places among an entry's channels and the numbers that stand there.
`packing/reference.py` defines the order of the bits. Where the entries stand in the sequence, and whether they were
rotated, is the segment's to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["token", "channel"]


@dataclass(frozen=True)
class Packed:
    """Codes of S entries of width D and what turns them back into numbers."""

    codes: torch.Tensor  # uint8
    scale: torch.Tensor  # fp16, bf16 or fp32
    zero: torch.Tensor | None  # as scale: the value of level 0, in an affine code the group's minimum; None: 0
    bits: int  # 1..8
    group: int  # entries (layout "token") or channels (layout "channel") that share a scale
    layout: Layout
    width: int  # D
    levels: torch.Tensor | None = None  # fp32 [2^bits]; None: level(code) = code
    outliers: tuple[torch.Tensor, torch.Tensor] | None = None  # index, value; each place at most once in an entry

    @property
    def tokens(self) -> int:
        """S, the entries held."""
        return self.codes.shape[2] * (self.group if self.layout == "token" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors held, without those that are None."""
        held = (self.codes, self.scale, self.zero, self.levels, *(self.outliers or ()))
        return tuple(t for t in held if t is not None)
