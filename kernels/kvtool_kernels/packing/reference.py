"""The definition of `packing`: the order of the bits. All of it is exact.

A run of n codes is stored as one plane per power of two in `bits`, the largest first (3 = 2 + 1, 7 = 4 + 2 + 1). The
first plane holds the low bits of the codes, the next the bits above them, and so on. In a plane of p bits

    byte j = Σ_i code[j + i · n·p/8] << (i · p),   i = 0 .. 8/p − 1,   j = 0 .. n·p/8 − 1

so that neighbouring bytes hold neighbouring codes and one shift and mask of a SIMD register yields consecutive codes.
Trits are codes 0..2, five to a byte: byte j = Σ_i 3^i · code[j + i·⌈n/5⌉], with 0 for the codes beyond n.
"""

from __future__ import annotations

import torch


def planes(bits: int) -> tuple[int, ...]:
    """The powers of two that make up `bits`, largest first."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return tuple(power for power in (8, 4, 2, 1) if bits & power)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [..., n] → uint8 [..., n·bits/8]; n is a multiple of 8. Bits above `bits` are dropped."""
    *batch, run = codes.shape
    if run % 8:
        raise ValueError(f"packing takes runs of a multiple of 8 codes, not {run}")
    out, taken = [], 0
    for power in planes(bits):
        parts = (codes >> taken & (1 << power) - 1).reshape(*batch, 8 // power, run * power // 8)
        byte = parts[..., 0, :].clone()
        for index in range(1, 8 // power):
            byte |= parts[..., index, :] << index * power
        out.append(byte)
        taken += power
    return torch.cat(out, dim=-1)


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., n·bits/8] → codes uint8 [..., n]."""
    codes = packed.new_zeros(*packed.shape[:-1], n)
    start, taken = 0, 0
    for power in planes(bits):
        plane = packed[..., start : start + n * power // 8]
        parts = [plane >> index * power & (1 << power) - 1 for index in range(8 // power)]
        codes |= torch.cat(parts, dim=-1) << taken
        start, taken = start + plane.shape[-1], taken + power
    return codes


def pack_trits(codes: torch.Tensor) -> torch.Tensor:
    """codes uint8 0..2 [..., n] → uint8 [..., ⌈n/5⌉]."""
    *batch, run = codes.shape
    width = -(-run // 5)
    parts = torch.nn.functional.pad(codes, (0, 5 * width - run)).reshape(*batch, 5, width)
    byte = parts[..., 0, :].clone()
    for index in range(1, 5):
        byte += parts[..., index, :] * 3**index
    return byte


def unpack_trits(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `pack_trits`: uint8 [..., ⌈n/5⌉] → codes uint8 [..., n]."""
    return torch.cat([packed // 3**index % 3 for index in range(5)], dim=-1)[..., :n]
