"""Angles of angles: an entry as one radius for a few channels and the directions that lead back from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool.encoding.codecs._base import Codec, Parts, named, parts_of
from kvtool.encoding.codecs._groups import check_groups
from kvtool.encoding.codecs.levels import Levels
from kvtool.encoding.codecs.raw import Raw
from kvtool.encoding.tables import quarter
from kvtool.errors import InputError


@dataclass(frozen=True)
class Nested(Codec):
    """Neighbours (a, b) become an angle atan2(b, a) and a radius √(a² + b²), radii again so, once for each of `bits`.

    Angles of the first level are cut into 2^bits equal cells of the whole circle; those of level l, which lie in
    [0, π/2], into the 2^bits cells that suit best what a vector of independent normal numbers has there, whose density
    is ∝ sin^(m−1)(2ψ), m = 2^(l−1). Of `width` channels width/2^levels radii are left, which fp16 holds. No entry needs
    a range: turned at random, all look alike.
    """

    bits: tuple[int, ...] = (4, 2, 2, 2)

    def __post_init__(self) -> None:
        if not self.bits:
            raise InputError("an entry without angles", got="no bits", expected="bits of one level or more")
        for bits in self.bits:
            check_groups(bits, 1, "channel")

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return {f"level{level}.codes": (bits, "channel") for level, bits in enumerate(self.bits)}

    def check(self, heads: int, width: int) -> None:
        if width % 2 ** len(self.bits):
            raise InputError(
                "channels cannot be halved so often", got=f"{width} channels, {len(self.bits)} levels",
                expected=f"a multiple of {2 ** len(self.bits)}",
            )  # fmt: skip

    def encode(self, z: torch.Tensor) -> Parts:
        x = z.float()
        parts: Parts = {}
        for level in range(len(self.bits)):
            first, second = x[..., 0::2], x[..., 1::2]
            angle = torch.atan2(second, first).remainder(2 * math.pi)
            x = torch.hypot(first, second)
            parts |= named(f"level{level}", self._cells(level, x.shape[-1]).encode(angle))
        return parts | named("radius", Raw("float16").encode(x))

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        x = Raw("float16").decode(parts_of("radius", parts), width >> len(self.bits))
        for level in reversed(range(len(self.bits))):
            count = width >> (level + 1)
            angle = self._cells(level, count).decode(parts_of(f"level{level}", parts), count)
            x = torch.stack([x * angle.cos(), x * angle.sin()], dim=-1).flatten(-2)
        return x

    def _cells(self, level: int, count: int) -> Levels:
        """What codes of `count` angles of a level stand for."""
        bits = self.bits[level]
        even = (2 * torch.arange(2**bits, dtype=torch.float32) + 1) * (math.pi / 2**bits)
        levels, gains = even if not level else quarter(bits, 2**level), torch.ones(1, count, dtype=torch.float32)
        return Levels(levels, 1, "channel", "fixed", gains)
