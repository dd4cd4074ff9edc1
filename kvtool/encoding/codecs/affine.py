"""Evenly spaced levels between the least and the largest number of each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.encoding.codecs._base import Codec, Parts
from kvtool.encoding.codecs._groups import check_groups, padded, whole_bytes, whole_groups, width_of, written
from kvtool_kernels.ops import dequantize, pack, quantize, unpack
from kvtool_kernels.packed import Packed


@dataclass(frozen=True)
class Affine(Codec):
    """x̂ = code·s + m with min–max ranges: `bits` 1–8, `group` entries of a channel (axis "token", as KIVI's keys) or
    channels of an entry (axis "channel", as its values) share s and m, which take 16 bits each.

    `clip` shrinks both ends of the range before rounding (RotateKV). A group of equal numbers is exact, unless clipped.
    """

    bits: int
    group: int
    axis: Literal["token", "channel"]
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_groups(self.bits, self.group, self.axis)

    @property
    def block(self) -> int:
        return self.group if self.axis == "token" else 1

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return {"codes": (self.bits, self.axis)}

    def check(self, heads: int, width: int) -> None:
        whole_groups(self.group, self.axis, width, whole_bytes(width))

    def encode(self, z: torch.Tensor) -> Parts:
        made = quantize(padded(z, self.axis), bits=self.bits, group=self.group, layout=self.axis, clip=self.clip)
        assert made.zero is not None
        return {"codes": made.codes, "scale": made.scale, "zero": made.zero}

    def coarser(self, parts: Parts, other: Codec) -> Parts | None:
        """The high bits of the codes, with the middle of what they leave open: s′ = 2ⁿ·s, m′ = m + s·(2ⁿ − 1)/2."""
        if not isinstance(other, Affine) or (other.group, other.axis) != (self.group, self.axis):
            return None
        dropped, packed = self.bits - other.bits, self.packed(parts)
        if dropped < 0:
            return None
        codes = unpack(packed.codes, self.bits, self.group if self.axis == "token" else packed.width)
        grouped = codes if self.axis == "token" else codes.unflatten(-1, (-1, self.group))
        scale = parts["scale"].float()
        varied = (grouped > 0).any(-1)  # equal numbers have code 0, and stay what they are
        middle = torch.where(varied, scale * (2**dropped - 1) / 2, 0.0)
        wide, zero = written(scale * 2**dropped, parts["zero"].float() + middle)
        assert zero is not None
        return {"codes": pack(codes >> dropped, other.bits), "scale": wide, "zero": zero}

    def packed(self, parts: Parts) -> Packed:
        codes, scale, zero = parts["codes"], parts["scale"], parts["zero"]
        return Packed(codes, scale, zero, self.bits, self.group, self.axis, width_of(codes, self.bits, self.axis))

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        return dequantize(self.packed(parts))[..., :width]
