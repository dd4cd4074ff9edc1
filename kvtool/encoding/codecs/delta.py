"""Entries as differences to the first of their group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from kvtool.encoding.codecs._base import Codec, Parts, named, parts_of
from kvtool.errors import InputError


@dataclass(frozen=True)
class Delta(Codec):
    """Of `group` entries the first, their anchor, is written by `anchor`, and of the others x − x̂ₐ by `rest`
    (CacheGen): neighbours resemble each other, so differences are small. x̂ₐ is the anchor as it is read back, so that
    both sides of the code see the same numbers.

    A part holds a block of entries at each index of axis 2, whose tensors follow.
    """

    anchor: Codec
    rest: Codec
    group: int = 10

    def __post_init__(self) -> None:
        if self.group < 2:
            raise InputError("bad group of differences", got=self.group, expected="2 or more")

    @property
    def block(self) -> int:
        others = self.rest.block // math.gcd(self.rest.block, self.group - 1)
        return self.group * math.lcm(self.anchor.block, others)

    @property
    def fits(self) -> bool:
        return self.anchor.fits or self.rest.fits

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return named("anchor", self.anchor.codes) | named("rest", self.rest.codes)

    def fit(self, z: torch.Tensor) -> Delta:
        anchor = self.anchor.fit(z[:, :, :: self.group])
        made = replace(self, anchor=anchor)
        return replace(made, rest=self.rest.fit(made._differences(z, anchor.encode(z[:, :, :: self.group]))))

    def check(self, heads: int, width: int) -> None:
        self.anchor.check(heads, width)
        self.rest.check(heads, width)

    def heads(self, indices: list[int]) -> Delta:
        return replace(self, anchor=self.anchor.heads(indices), rest=self.rest.heads(indices))

    def encode(self, z: torch.Tensor) -> Parts:
        if z.shape[2] == 0:
            block = self.encode(z.new_zeros(*z.shape[:2], self.block, z.shape[3]))
            return {name: tensor[:, :, :0] for name, tensor in block.items()}
        first = self.anchor.encode(z[:, :, :: self.group])
        parts = named("anchor", first) | named("rest", self.rest.encode(self._differences(z, first)))
        return {name: tensor.unflatten(2, (z.shape[2] // self.block, -1)) for name, tensor in parts.items()}

    def _differences(self, z: torch.Tensor, first: Parts) -> torch.Tensor:
        """What `rest` is given of z [B,K,S,r], fp32, group by group."""
        anchors = self.anchor.decode(first, z.shape[-1])
        return (z.float().unflatten(2, (-1, self.group))[:, :, :, 1:] - anchors[:, :, :, None]).flatten(2, 3)

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        flat = {name: tensor.flatten(2, 3) for name, tensor in parts.items()}
        anchors = self.anchor.decode(parts_of("anchor", flat), width)[:, :, :, None]
        shape = (*anchors.shape[:3], self.group - 1, width)
        others = self.rest.decode(parts_of("rest", flat), width).reshape(shape)
        return torch.cat([anchors, anchors + others], dim=3).flatten(2, 3)
