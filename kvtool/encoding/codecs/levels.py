"""Levels from a table, in the range of each group or in fixed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvtool.encoding.codecs._base import Codec, Parts
from kvtool.encoding.codecs._groups import check_groups, grouped, padded, whole_bytes, whole_groups, width_of, written
from kvtool.errors import InputError
from kvtool_kernels.ops import dequantize, quantize_levels
from kvtool_kernels.packed import Packed


@dataclass(frozen=True)
class Levels(Codec):
    """x̂ = levels[code]·s + m: a look-up table of 2^bits sorted levels, fp32, for numbers in a normalised range.

    `scale` and `zero` fp32 [K|1,D/group] are fixed ranges (KVQuant's keys); without them each group has its own:
    mid-range and half-width (`ranges="minmax"`), or mean and deviation ("moments": levels of a unit normal), or the
    root mean square ("norm": the same levels, m = 0), or the largest |x| ("peak", m = 0), or for signs the mean of |x|
    ("absolute", m = 0). Numbers outside the table take its nearest end. Where a group's numbers are all equal s is 0
    with "minmax" and "moments", so that they come back as m. `renormalise`, with "norm": once the codes are known, s is
    what gives x̂ the norm of x.
    `restored`, of the same length: what codes stand for, where that is not the level that chose them (KVQuant).
    """

    levels: torch.Tensor
    group: int
    axis: Literal["token", "channel"]
    ranges: Literal["fixed", "minmax", "moments", "norm", "absolute", "peak"] = "minmax"
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    renormalise: bool = False
    restored: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.levels) & (len(self.levels) - 1):
            raise InputError("a table of levels", got=f"{len(self.levels)} of them", expected="2, 4, 8 or 16")
        if (self.ranges == "fixed") != (self.scale is not None):
            raise InputError("a table with fixed ranges needs `scale`, and only that one does", got=self.ranges)
        if self.ranges == "fixed" and self.axis == "token":
            raise InputError("fixed ranges are per channel", got="axis token", expected="axis channel")
        if self.renormalise and self.ranges != "norm":
            raise InputError("only ranges that are norms can be corrected", got=self.ranges, expected="norm")
        if self.restored is not None and (self.renormalise or len(self.restored) != len(self.levels)):
            raise InputError(
                "bad restored levels", got=len(self.restored), expected=f"{len(self.levels)}, no correction"
            )
        check_groups(self.bits, self.group, self.axis)

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    @property
    def block(self) -> int:
        return self.group if self.axis == "token" else 1

    @property
    def codes(self) -> dict[str, tuple[int, str]]:
        return {"codes": (self.bits, self.axis)}

    def check(self, heads: int, width: int) -> None:
        whole_groups(self.group, self.axis, width, whole_bytes(width))
        for fixed in (self.scale, self.zero):
            if fixed is not None and (len(fixed) not in (1, heads) or fixed.shape[1] != width // self.group):
                raise InputError(
                    "fixed ranges of another shape", got=list(fixed.shape), expected=[heads, width // self.group]
                )

    def encode(self, z: torch.Tensor) -> Parts:
        z = padded(z, self.axis)
        scale, zero = self._fixed(z) if self.ranges == "fixed" else written(*self._ranges(z))
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        made = quantize_levels(
            z, levels=self.levels.to(z.device), scale=divisor, zero=zero,
            bits=self.bits, group=self.group, layout=self.axis,
        )  # fmt: skip
        if self.ranges == "fixed":
            return {"codes": made.codes}
        if self.renormalise:
            scale = written(self._corrected(z, made))[0]
        return {"codes": made.codes, "scale": scale} | ({} if zero is None else {"zero": zero})

    def heads(self, indices: list[int]) -> Levels:
        fixed = [x if x is None or len(x) == 1 else x[indices] for x in (self.scale, self.zero)]
        return replace(self, scale=fixed[0], zero=fixed[1])

    def _fixed(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero [1,K|1,1,r/g] for the padded width, on the device of `like`."""
        assert self.scale is not None
        missing = (0, whole_bytes(self.scale.shape[1] * self.group) // self.group - self.scale.shape[1])
        scale, zero = (
            None if fixed is None else torch.nn.functional.pad(fixed.to(like.device), missing)[None, :, None]
            for fixed in (self.scale, self.zero)
        )
        assert scale is not None
        return scale, zero

    def _ranges(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = grouped(z, self.group, self.axis)
        if self.ranges == "absolute":
            return x.abs().mean(-1), None
        if self.ranges == "peak":
            return x.abs().amax(-1), None
        if self.ranges == "norm":
            return _norm(x) / self.group**0.5, None
        if self.ranges == "moments":
            mean = x.mean(-1)
            return x.std(-1, correction=0) if mean.numel() else mean, mean  # std warns where there is nothing
        low, high = x.amin(-1), x.amax(-1)
        return (high - low) / 2, (high + low) / 2

    def _corrected(self, z: torch.Tensor, made: Packed) -> torch.Tensor:
        """s = ‖x‖ / ‖levels[code]‖ of each group."""
        bare = dequantize(replace(made, scale=torch.ones_like(made.scale)))
        sizes = [_norm(grouped(x, self.group, self.axis)) for x in (z, bare)]
        return sizes[0] / sizes[1].clamp_min(torch.finfo(torch.float32).tiny)

    def packed(self, parts: Parts) -> Packed:
        codes = parts["codes"]
        scale, zero = self._fixed(codes) if self.ranges == "fixed" else (parts["scale"], parts.get("zero"))
        levels = (self.levels if self.restored is None else self.restored).to(codes.device)
        return Packed(
            codes, scale, zero, self.bits, self.group, self.axis, width_of(codes, self.bits, self.axis), levels
        )

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        return dequantize(self.packed(parts))[..., :width]


def _norm(x: torch.Tensor) -> torch.Tensor:
    """‖x‖ over the last axis, whose squares neither overflow nor vanish."""
    size = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / size).norm(dim=-1) * size[..., 0]
