"""Numbers as they come, or as a floating-point type holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.encoding.codecs._base import Codec, Parts
from kvtool.errors import InputError

FLOATS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Raw(Codec):
    """Numbers of a floating-point type, whose largest stands for all beyond; "model" keeps the type they come in."""

    dtype: str = "model"

    def __post_init__(self) -> None:
        if self.dtype != "model" and self.dtype not in FLOATS:
            raise InputError("unknown number type", got=self.dtype, expected=", ".join(FLOATS))

    @property
    def lossless(self) -> bool:
        return self.dtype == "model"

    def encode(self, z: torch.Tensor) -> Parts:
        if self.dtype == "model":
            return {"dense": z}
        kind = FLOATS[self.dtype]
        limit = min(torch.finfo(kind).max, torch.finfo(z.dtype).max)
        return {"dense": z.clamp(-limit, limit).to(kind)}

    def packed(self, parts: Parts) -> torch.Tensor:
        return parts["dense"]

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        return parts["dense"].float()
