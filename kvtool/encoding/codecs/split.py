"""Different codecs for different channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from kvtool.encoding.codecs._base import Codec, Parts, named, parts_of
from kvtool.errors import InputError


@dataclass(frozen=True)
class Split(Codec):
    """The first `widths[0]` channels are written by `codecs[0]`, the next `widths[1]` by `codecs[1]`, and so on.

    A `Gather` before it says which channels those are.
    """

    codecs: tuple[Codec, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.codecs) != len(self.widths) or min(self.widths, default=0) < 1:
            raise InputError(
                "each codec has its channels", got=f"{len(self.codecs)} codecs, widths {list(self.widths)}",
                expected="one width for each codec, 1 or more",
            )  # fmt: skip

    @property
    def block(self) -> int:
        return math.lcm(*(codec.block for codec in self.codecs))

    @property
    def lossless(self) -> bool:
        return all(codec.lossless for codec in self.codecs)

    @property
    def fits(self) -> bool:
        return any(codec.fits for codec in self.codecs)

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        each = [named(str(number), codec.codes) for number, codec in enumerate(self.codecs)]
        return {name: code for codes in each for name, code in codes.items()}

    def fit(self, z: torch.Tensor) -> Split:
        slices = z.split(self.widths, dim=-1)
        return replace(self, codecs=tuple(codec.fit(x) for codec, x in zip(self.codecs, slices, strict=True)))

    def check(self, heads: int, width: int) -> None:
        if sum(self.widths) != width:
            raise InputError("channels of a split", got=list(self.widths), expected=f"{width} together")
        for codec, own in zip(self.codecs, self.widths, strict=True):
            codec.check(heads, own)

    def heads(self, indices: list[int]) -> Split:
        return replace(self, codecs=tuple(codec.heads(indices) for codec in self.codecs))

    def encode(self, z: torch.Tensor) -> Parts:
        parts: Parts = {}
        for number, (codec, x) in enumerate(zip(self.codecs, z.split(self.widths, dim=-1), strict=True)):
            parts |= named(str(number), codec.encode(x))
        return parts

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        each = enumerate(zip(self.codecs, self.widths, strict=True))
        return torch.cat([codec.decode(parts_of(str(number), parts), own) for number, (codec, own) in each], dim=-1)
