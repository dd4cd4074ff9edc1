"""Three levels, five numbers to a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.encoding.codecs._base import Codec, Parts
from kvtool.encoding.codecs._groups import check_groups, grouped, whole_groups, written
from kvtool_kernels.ops import pack_trits, unpack_trits


@dataclass(frozen=True)
class Ternary(Codec):
    """x̂ ∈ {−s, 0, s}, five trits to a byte: 1.6 bits and a 16-bit scale per `group`.

    code ≠ 0 where |x| > threshold·mean|x|; s is the mean |x| of those, the least-squares scale for these codes.
    Along "token", a group of `group` entries of a channel takes ⌈group/5⌉ bytes.
    """

    group: int
    axis: Literal["token", "channel"]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_groups(1, self.group, self.axis)

    @property
    def block(self) -> int:
        return self.group if self.axis == "token" else 1

    def check(self, heads: int, width: int) -> None:
        whole_groups(self.group, self.axis, width, width)

    def encode(self, z: torch.Tensor) -> Parts:
        x = grouped(z, self.group, self.axis)
        size = x.abs()
        kept = size > self.threshold * size.mean(-1, keepdim=True)
        scale = (size * kept).sum(-1) / kept.sum(-1).clamp_min(1)
        codes = (1 + x.sign() * kept).to(torch.uint8)  # 0, 1, 2 for −s, 0, s
        if self.axis == "channel":
            codes = codes.flatten(3)
        return {"codes": pack_trits(codes), "scale": written(scale)[0]}

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        if self.axis == "token":
            signs = unpack_trits(parts["codes"], self.group).float() - 1
            return (signs * parts["scale"].float()[..., None]).transpose(3, 4).flatten(2, 3)
        signs = unpack_trits(parts["codes"], width).float() - 1
        return (signs.unflatten(3, (-1, self.group)) * parts["scale"].float()[..., None]).flatten(3)
