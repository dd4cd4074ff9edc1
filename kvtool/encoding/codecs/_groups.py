"""Groups of numbers that share a scale: `group` entries of a channel, or channels of an entry."""

from __future__ import annotations

from math import gcd

import torch

from kvtool.errors import InputError


def check_groups(bits: int, group: int, axis: str) -> None:
    """Raise InputError for a number of bits, a group or an axis that nothing can be written with."""
    if not 1 <= bits <= 8:
        raise InputError("bad bits", got=bits, expected="1 to 8")
    if group < 1:
        raise InputError("bad group", got=group, expected="1 or more")
    if axis not in ("token", "channel"):
        raise InputError("bad axis", got=axis, expected="token or channel")
    if axis == "token" and group not in (8, 16, 32, 64, 128):
        raise InputError("bad group along tokens", got=group, expected="8, 16, 32, 64 or 128")


def whole_groups(group: int, axis: str, *widths: int) -> None:
    """Groups of channels do not cross the end of the heads, nor that of the padding behind them."""
    if axis == "channel" and any(width % group for width in widths):
        raise InputError(
            f"groups of {group} channels do not divide the width", got=" padded to ".join(map(str, widths)),
            remedy=f"a group of {gcd(group, *widths)}, say (--set group={gcd(group, *widths)} in most methods)",
        )  # fmt: skip


def written(scale: torch.Tensor, zero: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As they are stored: in fp16 unless one would overflow there, then in bf16."""
    largest = torch.finfo(torch.float16).max
    small = all(bool((tensor.abs() <= largest).all()) for tensor in (scale, zero) if tensor is not None)
    kind = torch.float16 if small else torch.bfloat16
    return scale.to(kind), None if zero is None else zero.to(kind)


def whole_bytes(width: int) -> int:
    """Codes along channels fill whole bytes: widths go up to a multiple of 8."""
    return -(-width // 8) * 8


def padded(z: torch.Tensor, axis: str) -> torch.Tensor:
    """z with zeros behind its channels where codes run along them."""
    missing = whole_bytes(z.shape[-1]) - z.shape[-1]
    return z if axis == "token" or not missing else torch.nn.functional.pad(z, (0, missing))


def width_of(codes: torch.Tensor, bits: int, axis: str) -> int:
    """r, padded where codes run along channels."""
    return codes.shape[3] if axis == "token" else codes.shape[3] * 8 // bits


def grouped(z: torch.Tensor, group: int, axis: str) -> torch.Tensor:
    """z [B,K,S,r] → fp32 with what shares a scale on the last axis: [B,K,S/g,r,g], or [B,K,S,r/g,g]."""
    if axis == "token":
        return z.float().unflatten(2, (-1, group)).transpose(3, 4)
    return z.float().unflatten(3, (-1, group))
