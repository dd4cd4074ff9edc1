"""Pairs of channels as an angle and a radius."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool.encoding.codecs._base import Codec, Parts, named, parts_of
from kvtool.encoding.codecs._groups import check_groups
from kvtool.encoding.codecs.levels import Levels
from kvtool.errors import InputError


@dataclass(frozen=True)
class Polar(Codec):
    """Channels c and c + r/2 become φ = atan2(x_{c+r/2}, x_c) in [0, 2π) and ρ = √(x_c² + x_{c+r/2}²).

    Each is cut, per pair and `group` entries, into 2^bits equal cells between its least and its largest value, and
    comes back as the middle of its cell; a range of 0 comes back as it is. An angle's cells do not know that 0 is 2π.
    """

    angle: int = 4  # bits
    radius: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        for bits in (self.angle, self.radius):
            check_groups(bits, self.group, "token")

    @property
    def block(self) -> int:
        return self.group

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return {f"{side}.codes": (bits, "token") for side, bits in (("angle", self.angle), ("radius", self.radius))}

    def check(self, heads: int, width: int) -> None:
        if width % 2:
            raise InputError("channels do not come in pairs", got=width, expected="an even width")

    def encode(self, z: torch.Tensor) -> Parts:
        first, second = z.float().chunk(2, dim=-1)
        angle = torch.atan2(second, first).remainder(2 * math.pi)
        radius = torch.hypot(first, second)
        return named("angle", self._cells(self.angle).encode(angle)) | named(
            "radius", self._cells(self.radius).encode(radius)
        )

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        angle = self._cells(self.angle).decode(parts_of("angle", parts), width // 2)
        radius = self._cells(self.radius).decode(parts_of("radius", parts), width // 2)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)

    def _cells(self, bits: int) -> Levels:
        """The middles of 2^bits equal cells of each range."""
        return Levels((2 * torch.arange(2**bits) + 1) / 2**bits - 1, self.group, "token")
