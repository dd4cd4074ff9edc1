"""What the Triton twins over `Packed` share: reading codes out of their bit planes, and scales to go with them.

Each lane loads the byte that holds its code. Neighbouring lanes want neighbouring bytes, so that loads stay wide, and
the 8/p codes of a byte find it in the first-level cache.

A block of entries begins at `start` and holds `step` = 0, 1, ...; groups and blocks are powers of two, so that one
contains the other. Offsets within a block are 32 bits wide, to save registers. `CENTRE` is subtracted from codes and
added, times the scale, to the zero: centred codes are as small as they can be where a product is rounded to 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvtool_kernels.packed import Packed
from kvtool_kernels.tiles import channels_last


@triton.jit  # type: ignore[untyped-decorator]
def load_plane(run, index, mask, RUN: tl.constexpr, BITS: tl.constexpr, POWER: tl.constexpr):
    """The bits of codes that the plane of POWER bits holds, in their places."""
    TAKEN: tl.constexpr = BITS & (16 - 2 * POWER)  # the bits that larger planes hold
    LENGTH: tl.constexpr = RUN * POWER // 8
    byte = tl.load(run + RUN * TAKEN // 8 + index % LENGTH, mask=mask, other=0).to(tl.int32)
    return ((byte >> (index // LENGTH * POWER)) & ((1 << POWER) - 1)) << TAKEN


@triton.jit  # type: ignore[untyped-decorator]
def load_codes(run, index, mask, RUN: tl.constexpr, BITS: tl.constexpr):
    """Codes int32 at `index` of the runs of RUN codes whose bytes begin at `run` (`packing/reference.py`)."""
    FIRST: tl.constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2 if BITS >= 2 else 1
    code = load_plane(run, index, mask, RUN, BITS, FIRST)
    if FIRST > 2 and BITS & 2:
        code += load_plane(run, index, mask, RUN, BITS, 2)
    if FIRST > 1 and BITS & 1:
        code += load_plane(run, index, mask, RUN, BITS, 1)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def load_levels(
    codes, stride, levels, start, step, channel, mask,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, TOKEN: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """level(code) fp32 for step × channel (one [N,1], the other [1,D]); `stride` between groups, or entries."""
    if TOKEN:
        local = start % GROUP + step
        run = codes + tl.cast(start // GROUP, tl.int64) * stride
        code = load_codes(
            run + (local // GROUP * stride + channel * (GROUP * BITS // 8)), local % GROUP, mask, GROUP, BITS
        )
    else:
        code = load_codes(codes + tl.cast(start, tl.int64) * stride + step * stride, channel, mask, WIDTH, BITS)
    if levels is None:
        return (code - CENTRE).to(tl.float32)
    else:
        return tl.load(levels + code)


@triton.jit  # type: ignore[untyped-decorator]
def load_scale(
    scale, scale_s, zero, zero_s, start, step, part, mask, GROUP: tl.constexpr, CENTRE: tl.constexpr
):  # fmt: skip
    """Scale and zero, fp32, of the groups of GROUP entries that hold `start` + `step`, at `part` of a group's row."""
    first, local = tl.cast(start // GROUP, tl.int64), (start % GROUP + step) // GROUP
    factor = tl.load(scale + first * scale_s + (local * scale_s + part), mask=mask, other=0.0).to(tl.float32)
    offset = factor * CENTRE
    if zero is not None:
        offset += tl.load(zero + first * zero_s + (local * zero_s + part), mask=mask, other=0.0).to(tl.float32)
    return factor, offset


def arguments(packed: Packed, batch: int) -> tuple[torch.Tensor | int | None, ...]:
    """What a kernel takes: codes, scale and zero (or None), each with three strides, then levels. Nothing is empty."""
    codes = packed.codes if packed.codes[0, 0, 0].is_contiguous() else packed.codes.contiguous()
    taken: list[torch.Tensor | int | None] = [codes, *codes.stride()[:3]]
    for tensor in (packed.scale, packed.zero):
        if tensor is None:
            taken += [None, 0, 0, 0]
            continue
        (tensor,) = channels_last(tensor)
        tensor = tensor.expand(batch, *codes.shape[1:3], tensor.shape[3])  # one range for all entries: stride 0
        taken += [tensor, *tensor.stride()[:3]]
    return (*taken, packed.levels)
