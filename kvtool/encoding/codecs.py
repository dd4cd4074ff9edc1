"""The codec: how the numbers of one side are written down.

    parts = encode(z);   ẑ = decode(parts)

`parts` maps names to tensors with the batch on axis 0 and entries, or groups of entries, on axis 2, so appending is
concatenation there and nothing that was written is written again. `packed(parts)` is the form that kernels read
without decoding (see `kvtool_kernels/packed.py`), a dense tensor for codecs that are one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvtool.errors import InputError
from kvtool.records import Record
from kvtool_kernels.ops import dequantize, pack_trits, quantize, quantize_levels, unpack_trits
from kvtool_kernels.packed import Packed

Parts = dict[str, torch.Tensor]
FLOATS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


class Codec(Record, ABC):
    """One way of writing numbers."""

    @property
    def block(self) -> int:
        """Entries that are encoded together."""
        return 1

    @property
    def lossless(self) -> bool:
        return False

    @abstractmethod
    def encode(self, z: torch.Tensor) -> Parts:
        """z [B,K,S,r], S a multiple of `block`."""

    @abstractmethod
    def packed(self, parts: Parts) -> Packed | torch.Tensor | None:
        """The form that kernels read, or None when they cannot."""

    @abstractmethod
    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        """ẑ fp32 [B,K,S,r], r = `width`."""

    def check(self, heads: int, width: int) -> None:
        """Raise InputError unless this can write `heads` heads of `width` channels."""

    def heads(self, indices: list[int]) -> Codec:
        """The codec of these heads of the layer."""
        return self


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


@dataclass(frozen=True)
class Affine(Codec):
    """x̂ = code·s + m with min–max ranges: `bits` 1–8, `group` entries of a channel (axis "token", as KIVI's keys) or
    channels of an entry (axis "channel", as its values) share s and m, which take 16 bits each.

    `clip` shrinks the range before rounding (RotateKV). A group of equal numbers is exact.
    """

    bits: int
    group: int
    axis: Literal["token", "channel"]
    clip: float = 1.0

    def __post_init__(self) -> None:
        _check(self.bits, self.group, self.axis)

    @property
    def block(self) -> int:
        return self.group if self.axis == "token" else 1

    def check(self, heads: int, width: int) -> None:
        _whole_groups(self, width, _bytes(width))

    def encode(self, z: torch.Tensor) -> Parts:
        made = quantize(_padded(z, self.axis), bits=self.bits, group=self.group, layout=self.axis, clip=self.clip)
        assert made.zero is not None
        return {"codes": made.codes, "scale": made.scale, "zero": made.zero}

    def packed(self, parts: Parts) -> Packed:
        return Packed(
            parts["codes"], parts["scale"], parts["zero"], self.bits, self.group, self.axis, _width(parts, self)
        )

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        return dequantize(self.packed(parts))[..., :width]


@dataclass(frozen=True)
class Levels(Codec):
    """x̂ = levels[code]·s + m: a look-up table of 2^bits sorted levels, fp32, for numbers in a normalised range.

    `scale` and `zero` fp32 [K|1,D/group] are fixed ranges (KVQuant's keys); without them each group has its own:
    mid-range and half-width (`ranges="minmax"`), or mean and deviation ("moments": levels of a unit normal), or for
    signs the mean of |x| ("absolute", m = 0). Numbers outside the table take its nearest end. Where a group's numbers
    are all equal s is 0, so that they come back as m.
    """

    levels: torch.Tensor
    group: int
    axis: Literal["token", "channel"]
    ranges: Literal["fixed", "minmax", "moments", "absolute"] = "minmax"
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.levels) & (len(self.levels) - 1):
            raise InputError("a table of levels", got=f"{len(self.levels)} of them", expected="2, 4, 8 or 16")
        if (self.ranges == "fixed") != (self.scale is not None):
            raise InputError("a table with fixed ranges needs `scale`, and only that one does", got=self.ranges)
        if self.ranges == "fixed" and self.axis == "token":
            raise InputError("fixed ranges are per channel", got="axis token", expected="axis channel")
        _check(self.bits, self.group, self.axis)

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    @property
    def block(self) -> int:
        return self.group if self.axis == "token" else 1

    def check(self, heads: int, width: int) -> None:
        _whole_groups(self, width, _bytes(width))
        for fixed in (self.scale, self.zero):
            if fixed is not None and (len(fixed) not in (1, heads) or fixed.shape[1] != width // self.group):
                raise InputError(
                    "fixed ranges of another shape", got=list(fixed.shape), expected=[heads, width // self.group]
                )

    def encode(self, z: torch.Tensor) -> Parts:
        z = _padded(z, self.axis)
        scale, zero = self._fixed(z) if self.ranges == "fixed" else _written(*self._ranges(z))
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        made = quantize_levels(
            z, levels=self.levels.to(z.device), scale=divisor, zero=zero,
            bits=self.bits, group=self.group, layout=self.axis,
        )  # fmt: skip
        if self.ranges == "fixed":
            return {"codes": made.codes}
        return {"codes": made.codes, "scale": scale} | ({} if zero is None else {"zero": zero})

    def heads(self, indices: list[int]) -> Levels:
        fixed = [x if x is None or len(x) == 1 else x[indices] for x in (self.scale, self.zero)]
        return replace(self, scale=fixed[0], zero=fixed[1])

    def _fixed(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero [1,K|1,1,r/g] for the padded width, on the device of `like`."""
        assert self.scale is not None
        missing = (0, _bytes(self.scale.shape[1] * self.group) // self.group - self.scale.shape[1])
        scale, zero = (
            None if fixed is None else torch.nn.functional.pad(fixed.to(like.device), missing)[None, :, None]
            for fixed in (self.scale, self.zero)
        )
        assert scale is not None
        return scale, zero

    def _ranges(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.axis == "token":
            grouped = z.float().unflatten(2, (-1, self.group)).transpose(3, 4)  # [B,K,S/g,r,g]
        else:
            grouped = z.float().unflatten(3, (-1, self.group))  # [B,K,S,r/g,g]
        if self.ranges == "absolute":
            return grouped.abs().mean(-1), None
        if self.ranges == "moments":
            mean = grouped.mean(-1)
            return grouped.std(-1, correction=0) if mean.numel() else mean, mean  # std warns where there is nothing
        low, high = grouped.amin(-1), grouped.amax(-1)
        return (high - low) / 2, (high + low) / 2

    def packed(self, parts: Parts) -> Packed:
        codes = parts["codes"]
        scale, zero = self._fixed(codes) if self.ranges == "fixed" else (parts["scale"], parts.get("zero"))
        levels = self.levels.to(codes.device)
        return Packed(codes, scale, zero, self.bits, self.group, self.axis, _width(parts, self), levels)

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        return dequantize(self.packed(parts))[..., :width]


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
        _check(1, self.group, self.axis)

    @property
    def block(self) -> int:
        return self.group if self.axis == "token" else 1

    def check(self, heads: int, width: int) -> None:
        _whole_groups(self, width, width)

    def encode(self, z: torch.Tensor) -> Parts:
        if self.axis == "token":
            grouped = z.float().unflatten(2, (-1, self.group)).transpose(3, 4)
        else:
            grouped = z.float().unflatten(3, (-1, self.group))
        size = grouped.abs()
        kept = size > self.threshold * size.mean(-1, keepdim=True)
        scale = (size * kept).sum(-1) / kept.sum(-1).clamp_min(1)
        codes = (1 + grouped.sign() * kept).to(torch.uint8)  # 0, 1, 2 for −s, 0, s
        if self.axis == "channel":
            codes = codes.flatten(3)
        return {"codes": pack_trits(codes), "scale": _written(scale)[0]}

    def packed(self, parts: Parts) -> None:
        return None

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        if self.axis == "token":
            signs = unpack_trits(parts["codes"], self.group).float() - 1
            return (signs * parts["scale"].float()[..., None]).transpose(3, 4).flatten(2, 3)
        signs = unpack_trits(parts["codes"], width).float() - 1
        return (signs.unflatten(3, (-1, self.group)) * parts["scale"].float()[..., None]).flatten(3)


def _check(bits: int, group: int, axis: str) -> None:
    if not 1 <= bits <= 8:
        raise InputError("bad bits", got=bits, expected="1 to 8")
    if group < 1:
        raise InputError("bad group", got=group, expected="1 or more")
    if axis not in ("token", "channel"):
        raise InputError("bad axis", got=axis, expected="token or channel")
    if axis == "token" and group not in (8, 16, 32, 64, 128):
        raise InputError("bad group along tokens", got=group, expected="8, 16, 32, 64 or 128")


def _whole_groups(codec: Affine | Levels | Ternary, *widths: int) -> None:
    """Groups of channels do not cross the end of the heads, nor that of the padding behind them."""
    if codec.axis == "channel" and any(width % codec.group for width in widths):
        raise InputError(
            f"groups of {codec.group} channels do not divide the width", got=" padded to ".join(map(str, widths))
        )


def _written(scale: torch.Tensor, zero: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As they are stored: in fp16 unless one would overflow there, then in bf16."""
    largest = torch.finfo(torch.float16).max
    small = all(bool((tensor.abs() <= largest).all()) for tensor in (scale, zero) if tensor is not None)
    kind = torch.float16 if small else torch.bfloat16
    return scale.to(kind), None if zero is None else zero.to(kind)


def _bytes(width: int) -> int:
    """Codes along channels fill whole bytes: widths go up to a multiple of 8."""
    return -(-width // 8) * 8


def _padded(z: torch.Tensor, axis: str) -> torch.Tensor:
    """z with zeros behind its channels where codes run along them."""
    missing = _bytes(z.shape[-1]) - z.shape[-1]
    return z if axis == "token" or not missing else torch.nn.functional.pad(z, (0, missing))


def _width(parts: Parts, codec: Affine | Levels) -> int:
    if codec.axis == "token":
        return parts["codes"].shape[3]
    return parts["codes"].shape[3] * 8 // codec.bits
