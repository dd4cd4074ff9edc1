"""Entries to codes in two passes: the range of each group, then codes by given zeros and scales.

Lanes are channels in both layouts. Codes are made in a tile, one row per entry; a plane of layout "channel" packs each
row along itself, one of layout "token" packs rows onto each other, and its bytes are turned at the end. Threads take
pieces of heads until none is left.
"""

from __future__ import annotations

import functools

from numba import float32

from kvtool_kernels._native.record import (
    CHUNK,
    FIRST_SIDE,
    FP32,
    HEADS,
    LANES,
    OUT,
    SCRATCH,
    SCRATCH_SIZE,
    SPLITS,
    THREAD,
    TILE,
    TOKENS,
    UNITS,
)
from kvtool_kernels._native.simd import (
    address_of,
    code_of,
    copy_byte,
    deposit,
    field,
    highest,
    load,
    lowest,
    maximum,
    minimum,
    read,
    splat,
    store,
    store_bytes,
    take,
    write,
)
from kvtool_kernels._native.team import STAMP, compiled
from kvtool_kernels._native.tile import inner_loop

# Behind the common fields of a job. Steps count numbers; LOW and HIGH are written by the first pass and read by the
# second as zero and scale; DOWN: are groups made of entries ("token")?
SOURCE, SOURCE_BATCH, SOURCE_HEAD, SOURCE_STEP, WIDTH, GROUP, DOWN, LOW, HIGH, BITS = range(FIRST_SIDE, FIRST_SIDE + 10)


@inner_loop
def across(x, step, count, width, group, low, high):
    """Ranges of `count` entries, by groups of channels: low, high [count, width / group]."""
    for _ in range(count):
        for at in range(0, width, group):
            least = load(FP32, LANES, x, at)
            most = least
            for c in range(at + LANES, at + group, LANES):
                value = load(FP32, LANES, x, c)
                least, most = minimum(least, value), maximum(most, value)
            write(low, 0, lowest(least))
            write(high, 0, highest(most))
            low += 4
            high += 4
        x += step * 4


@inner_loop
def down(x, step, count, width, group, low, high):
    """Ranges of `count` entries, by groups of entries: low, high [count / group, width]."""
    for _ in range(0, count, group):
        for c in range(0, width, LANES):
            least = load(FP32, LANES, x, c)
            most = least
            for entry in range(1, group):
                value = load(FP32, LANES, x, entry * step + c)
                least, most = minimum(least, value), maximum(most, value)
            store(low, c, least)
            store(high, c, most)
        x += group * step * 4
        low += width * 4
        high += width * 4


@inner_loop
def code_across(x, step, count, width, group, zero, scale, top, tile):
    """Codes of `count` entries, by groups of channels: tile [count, width]."""
    for _ in range(count):
        for at in range(0, width, group):
            offset, size = splat(LANES, read(zero, 0)), splat(LANES, read(scale, 0))
            for c in range(at, at + group, LANES):
                store(tile, c, code_of(load(FP32, LANES, x, c), offset, size, top))
            zero += 4
            scale += 4
        x += step * 4
        tile += width * 4


@inner_loop
def code_down(x, step, count, width, zero, scale, top, tile):
    """Codes of one group of `count` entries: tile [count, width]."""
    for c in range(0, width, LANES):
        offset, size = load(FP32, LANES, zero, c), load(FP32, LANES, scale, c)
        for entry in range(count):
            store(tile, entry * width + c, code_of(load(FP32, LANES, x, entry * step + c), offset, size, top))


def _packing(lanes):
    @inner_loop
    def pack(source, rows, row_step, first, last, part_step, power, taken, target, target_step):
        """Bytes `first` .. `last` of each row: Σ_i (code[i · part_step + byte] >> taken) << i · power."""
        parts, mask = 8 // power, (1 << power) - 1
        for _ in range(rows):
            for byte in range(first, last, lanes):
                bits = splat(lanes, float32(0.0))
                for part in range(parts):
                    value = load(FP32, lanes, source, part * part_step + byte)
                    bits = deposit(bits, value, taken, mask, part * power)
                store_bytes(target, byte, bits)
            source += row_step * 4
            target += target_step

    return pack


# The parts of a plane are whole vectors, or else a multiple of two bytes long.
pack_16, pack_8, pack_2 = _packing(LANES), _packing(8), _packing(2)


@inner_loop
def pack(source, rows, row_step, length, part_step, power, taken, target, target_step):
    """One plane of all rows, `length` bytes each."""
    wide, half = length - length % LANES, length - length % 8
    pack_16(source, rows, row_step, 0, wide, part_step, power, taken, target, target_step)
    pack_8(source, rows, row_step, wide, half, part_step, power, taken, target, target_step)
    pack_2(source, rows, row_step, half, length, part_step, power, taken, target, target_step)


@inner_loop
def pack_across(tile, count, width, bits, out):
    """tile [count, width] → out [count, width · bits / 8]."""
    start = 0
    for power in (8, 4, 2, 1):
        if bits & power:
            length = width * power // 8
            pack(tile, count, width, length, length, power, bits & 16 - 2 * power, out + start, width * bits // 8)
            start += length


@inner_loop
def pack_down(tile, count, width, bits, out, turned):
    """tile [count, width] → out [width, count · bits / 8]; `turned` has room for as much."""
    start, total = 0, count * bits // 8
    for power in (8, 4, 2, 1):
        if bits & power:
            length = count * power // 8
            pack(
                tile, length, width, width, length * width, power, bits & 16 - 2 * power, turned + start * width, width
            )
            start += length
    for c in range(width):
        for byte in range(total):
            copy_byte(turned, byte * width + c, out, c * total + byte)


@functools.lru_cache(maxsize=1)
def ranges() -> int:
    """The compiled function that writes low and high of each group."""
    stamp = STAMP

    def bounds(pointer):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        job = address_of(pointer)
        splits, heads, tokens, step = field(job, SPLITS), field(job, HEADS), field(job, TOKENS), field(job, SOURCE_STEP)
        width, group = field(job, WIDTH), field(job, GROUP)
        unit = take(job)
        while unit < field(job, UNITS):
            lead, first = unit // splits, unit % splits * field(job, CHUNK)
            count = min(field(job, CHUNK), tokens - first)
            near = lead // heads * field(job, SOURCE_BATCH) + lead % heads * field(job, SOURCE_HEAD) + first * step
            x, at = field(job, SOURCE) + near * 4, (lead * tokens + first) * width // group * 4
            if field(job, DOWN):
                down(x, step, count, width, group, field(job, LOW) + at, field(job, HIGH) + at)
            else:
                across(x, step, count, width, group, field(job, LOW) + at, field(job, HIGH) + at)
            unit = take(job)

    return compiled("void(voidptr)", bounds)


@functools.lru_cache(maxsize=1)
def function() -> int:
    """The compiled function that writes the codes."""
    stamp = STAMP

    def encode(pointer):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        job = address_of(pointer)
        tile = field(job, SCRATCH) + take(job + THREAD * 8) * field(job, SCRATCH_SIZE)
        splits, heads, tokens, step = field(job, SPLITS), field(job, HEADS), field(job, TOKENS), field(job, SOURCE_STEP)
        width, group, bits, rows = field(job, WIDTH), field(job, GROUP), field(job, BITS), field(job, TILE)
        top, turned = splat(LANES, float32((1 << bits) - 1)), tile + rows * width * 4
        unit = take(job)
        while unit < field(job, UNITS):
            lead, begin = unit // splits, unit % splits * field(job, CHUNK)
            near = lead // heads * field(job, SOURCE_BATCH) + lead % heads * field(job, SOURCE_HEAD)
            for first in range(begin, min(begin + field(job, CHUNK), tokens), rows):
                count = min(rows, tokens - first)
                x, before = field(job, SOURCE) + (near + first * step) * 4, (lead * tokens + first) * width
                zero, scale = field(job, LOW) + before // group * 4, field(job, HIGH) + before // group * 4
                out = field(job, OUT) + before * bits // 8
                if field(job, DOWN):
                    code_down(x, step, count, width, zero, scale, top, tile)
                    pack_down(tile, count, width, bits, out, turned)
                else:
                    code_across(x, step, count, width, group, zero, scale, top, tile)
                    pack_across(tile, count, width, bits, out)
            unit = take(job)

    return compiled("void(voidptr)", encode)
