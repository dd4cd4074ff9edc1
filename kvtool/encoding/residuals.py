"""What a codec gets wrong, kept beside it: the largest numbers as they are, or the error's strongest directions.

Both are written as parts (see `codecs/_base.py`): batch on axis 0, entries or blocks on axis 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvtool.encoding.codecs import Parts
from kvtool.errors import InputError
from kvtool.records import Record


@dataclass(frozen=True)
class Outliers(Record):
    """Per vector the `count` numbers furthest from its mean are taken out before coding and kept exactly (fp16).

    A vector is an entry (axis "channel": `count` of its r numbers) or a channel of `block` entries (axis "token").
    The codec sees the mean of the rest in their place, so its ranges shrink. A stored outlier comes back exactly as
    fp16 holds it. Capacity is fixed: (16 + 16) bits each.

    `scale` and `zero` fp32 [K|1,r], along "channel" only, are ranges known beforehand: the furthest are then those of
    the largest |x − zero| / scale, and the codec sees `zero` in their place.
    """

    count: int
    axis: Literal["token", "channel"]
    block: int = 1  # entries in a vector along "token"
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError("bad outlier count", got=self.count, expected="1 or more")
        if (self.scale is None) != (self.zero is None) or (self.scale is not None and self.axis == "token"):
            raise InputError(
                "bad ranges of outliers", got=f"axis {self.axis}", expected="scale and zero, along channels, or neither"
            )

    def check(self, heads: int, width: int) -> None:
        """Raise InputError unless this fits `heads` heads of `width` channels."""
        for known in (self.scale, self.zero):
            if known is not None and (len(known) not in (1, heads) or known.shape[1] != width):
                raise InputError("ranges of outliers of another shape", got=list(known.shape), expected=[heads, width])

    def heads(self, indices: list[int]) -> Outliers:
        """Those of these heads of the layer."""
        known = [x if x is None or len(x) == 1 else x[indices] for x in (self.scale, self.zero)]
        return replace(self, scale=known[0], zero=known[1])

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        """z [B,K,S,r] → what the codec is given, and the parts: index int16 and value fp16 [B,K,S/block,(r,)count]."""
        vectors = self._vectors(z.float())
        index = self._distance(vectors).topk(min(self.count, vectors.shape[-1]), dim=-1).indices
        values = vectors.gather(-1, index)
        bare = vectors.scatter(-1, index, self._centre(vectors, values).expand_as(vectors).gather(-1, index))
        limit = torch.finfo(torch.float16).max
        return self._entries(bare).to(z.dtype), {
            "outliers.index": index.to(torch.int16),
            "outliers.value": values.clamp(-limit, limit).half(),
        }

    def join(self, z: torch.Tensor, parts: Parts) -> torch.Tensor:
        """ẑ fp32 [B,K,S,r] with the outliers put back."""
        index, value = self.kept(parts)
        return self._entries(self._vectors(z).scatter(-1, index.long(), value.float()))

    def kept(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and numbers of a vector's outliers."""
        return parts["outliers.index"], parts["outliers.value"]

    def _distance(self, vectors: torch.Tensor) -> torch.Tensor:
        if self.scale is None or self.zero is None:
            return (vectors - vectors.mean(-1, keepdim=True)).abs()
        scale = self.scale[:, None].to(vectors).clamp_min(torch.finfo(torch.float32).tiny)
        return (vectors - self.zero[:, None].to(vectors)).abs() / scale

    def _centre(self, vectors: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What stands for an outlier: its channel's zero, or the mean of the vector's other numbers."""
        if self.zero is not None:
            return self.zero[:, None].to(vectors)
        others = max(1, vectors.shape[-1] - values.shape[-1])
        return (vectors.sum(-1, keepdim=True) - values.sum(-1, keepdim=True)) / others

    def _vectors(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.axis == "channel" else z.unflatten(2, (-1, self.block)).transpose(3, 4)

    def _entries(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self.axis == "channel" else vectors.transpose(3, 4).flatten(2, 3)


@dataclass(frozen=True)
class ErrorBasis(Record):
    """The codec's error of each block as a product of rank `rank`: left fp16 [B,K,S,ρ], right fp16 [B,K,blocks,ρ,r].

    The right factor spans the leading right singular space, found by `loops` rounds of power iteration from a fixed
    start, and is orthonormal, so the remaining error is never larger than the codec's own.
    """

    rank: int
    block: int
    loops: int = 3

    def __post_init__(self) -> None:
        if self.rank < 1 or self.block < 1:
            raise InputError("bad error basis", got=f"rank {self.rank}, block {self.block}", expected="1 or more each")

    def of(self, error: torch.Tensor) -> Parts:
        """error fp32 [B,K,S,r], S a multiple of `block` → the parts."""
        blocks = error.unflatten(2, (-1, self.block))  # [B,K,n,block,r]
        rank = min(self.rank, *blocks.shape[-2:])
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(blocks.shape[-1], rank, generator=draw, dtype=torch.float32)
        right = start.to(error).expand(*blocks.shape[:3], -1, -1)
        size = blocks.abs().amax((-2, -1), keepdim=True) if blocks.numel() else 1.0
        unit = blocks / (size + torch.finfo(torch.float32).tiny)  # squares neither overflow nor vanish
        for _ in range(self.loops):
            right = torch.linalg.qr(unit.transpose(-1, -2) @ (unit @ right))[0]
        right = right.half().float()
        limit = torch.finfo(torch.float16).max
        left = (blocks @ right).clamp(-limit, limit)
        return {"error.left": left.flatten(2, 3).half(), "error.right": right.transpose(-1, -2).half()}

    def add(self, z: torch.Tensor, parts: Parts) -> torch.Tensor:
        """ẑ fp32 [B,K,S,r] plus the stored product."""
        left = parts["error.left"].float().unflatten(2, (-1, self.block))
        return z + (left @ parts["error.right"].float()).flatten(2, 3)
