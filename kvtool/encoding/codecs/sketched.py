"""A codec and the signs of a random sketch of what it gets wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from kvtool.encoding.codecs._base import Codec, Parts, named, parts_of
from kvtool.encoding.codecs.levels import Levels
from kvtool.errors import InputError

ROOT = math.sqrt(math.pi / 2)
SIGNS = torch.tensor([-ROOT, ROOT], dtype=torch.float32)  # times ‖x‖, over the rows of a sketch: q·x̂ is unbiased


def signs(rows: int) -> Levels:
    """The signs of so many numbers and their norm; read back ±√(π/2) times their root mean square."""
    return Levels(SIGNS, rows, "channel", "norm")


@dataclass(frozen=True)
class Sketched(Codec):
    """x̂ = base + √(π/2)/m · ‖e‖ · sign(e·S)·Sᵀ for the error e of `base`; S fp32 [r,m] is `sketch` (TurboQuant).

    Over random S with orthogonal columns of length √r the mean of q·x̂ is close to q·x for every q, whatever `base`
    does. The norm that is kept is ‖e·S‖/√m, which is ‖e‖ if S has whole blocks of r such columns.
    """

    base: Levels
    sketch: torch.Tensor

    @property
    def block(self) -> int:
        return self.base.block

    @property
    def _signs(self) -> Levels:
        return signs(self.sketch.shape[1])

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return named("base", self.base.codes) | named("sketch", self._signs.codes)

    def check(self, heads: int, width: int) -> None:
        if len(self.sketch) != width:
            raise InputError("a sketch of another width", got=len(self.sketch), expected=width)
        self.base.check(heads, width)
        self._signs.check(heads, self.sketch.shape[1])

    def heads(self, indices: list[int]) -> Sketched:
        return replace(self, base=self.base.heads(indices))

    def encode(self, z: torch.Tensor) -> Parts:
        parts = self.base.encode(z)
        error = z.float() - self.base.decode(parts, z.shape[-1])
        return named("base", parts) | named("sketch", self._signs.encode(error @ self.sketch.to(error.device)))

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        rows = self.sketch.shape[1]
        seen = self._signs.decode(parts_of("sketch", parts), rows)
        back = seen @ self.sketch.T.to(seen.device) / rows
        return self.base.decode(parts_of("base", parts), width) + back
