"""Tiles of decoded entries: [t][D] from layout "channel" and dense entries, [d][t] from layout "token"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import float32

from kvtool_kernels._native.lanes import first_of, look_among, short
from kvtool_kernels._native.record import (
    APART,
    APART_BATCH,
    APART_HEAD,
    BATCH_STRIDE,
    BF16,
    CHANNEL,
    COUNT,
    DATA,
    DENSE,
    DTYPE,
    EXPANDED,
    FP16,
    FP32,
    GROUP,
    HEAD_STRIDE,
    INDEX,
    KIND,
    LANES,
    LENGTH,
    LEVELS,
    PER_LANE,
    PER_RUN,
    PLANE,
    PLANES,
    RUN,
    SCALE,
    SCALE_BATCH,
    SCALE_DTYPE,
    SCALE_HEAD,
    SCALE_STEP,
    SHIFT,
    STEP,
    TAKEN,
    VALUE,
    WIDTH,
    ZERO,
)
from kvtool_kernels._native.simd import field, fma, invoke, load, look_up, read, splat, store, write

inner_loop: Callable[[Callable[..., Any]], Any] = numba.njit(error_model="numpy")


@inner_loop
def clear(target, count):
    """target[: count] = 0, in whole vectors."""
    for at in range(0, count, LANES):
        store(target, at, splat(LANES, float32(0.0)))


@inner_loop
def floats(dtype, source, first, count, target):
    """target[i] = source[first + i] as fp32, i < count."""
    whole = count - count % LANES
    if dtype == FP16:
        for i in range(0, whole, LANES):
            store(target, i, load(FP16, LANES, source, first + i))
        for i in range(whole, count):
            store(target, i, load(FP16, 1, source, first + i))
    elif dtype == BF16:
        for i in range(0, whole, LANES):
            store(target, i, load(BF16, LANES, source, first + i))
        for i in range(whole, count):
            store(target, i, load(BF16, 1, source, first + i))
    else:
        for i in range(0, whole, LANES):
            store(target, i, load(FP32, LANES, source, first + i))
        for i in range(whole, count):
            store(target, i, load(FP32, 1, source, first + i))


@inner_loop
def expand(source, count, group, target):
    """Each of `count` numbers `group` times."""
    for i in range(count):
        value = read(source, i)
        for c in range(group):
            write(target, i * group + c, value)


@inner_loop
def look(side, count, target, pitch, scales, zeros, scale_step):
    """Codes in fp32, in place: their levels, scaled."""
    run, shift, levels, known = field(side, RUN), field(side, SHIFT), field(side, LEVELS), field(side, COUNT)
    table = first_of(levels, min(known, LANES))
    for _ in range(count):
        for at in range(0, run, LANES):
            if shift == PER_LANE:
                gain, offset = load(FP32, LANES, scales, at), load(FP32, LANES, zeros, at)
            else:
                gain, offset = splat(LANES, read(scales, at >> shift)), splat(LANES, read(zeros, at >> shift))
            code = first_of(target + at * 4, min(run - at, LANES))  # no code stands behind the run
            store(target, at, fma(look_among(table, code) if known <= LANES else look_up(levels, code), gain, offset))
        target += pitch * 4
        scales += scale_step * 4
        zeros += scale_step * 4


@inner_loop
def spread(side, source, count, target, pitch, scales, zeros, scale_step, units):
    """`count` runs of codes to x̂."""
    step, shift, levels = field(side, STEP), field(side, SHIFT), field(side, LEVELS)
    gain, offset, next_gain, how = scales, zeros, scale_step, shift
    if levels:
        gain, offset, next_gain, how = units, units + 4, 0, PER_RUN
    for index in range(field(side, PLANES)):
        length = field(side, LENGTH + index)
        given = (source, step, count, length, target, pitch, gain, offset, next_gain, how)
        invoke(field(side, PLANE + index), given, float32(1 << field(side, TAKEN + index)))
        source += length
    if levels:
        look(side, count, target, pitch, scales, zeros, scale_step)


@inner_loop
def put_apart(side, batch, head, first, count, tile, row, column):
    """Outliers of `count` entries to their places; entries are `row` numbers apart in the tile, channels `column`."""
    each = field(side, APART)
    near = batch * field(side, APART_BATCH) + head * field(side, APART_HEAD) + first * each
    for at in range(count * each):
        place = at // each * row + short(field(side, INDEX), near + at) * column
        store(tile, place, load(FP16, 1, field(side, VALUE), near + at))


@inner_loop
def decode(side, batch, head, first, count, tile, pitch, scratch, room):
    """Entries `first` .. `first + count` of one head into `tile`; rows of the tile are `pitch` apart.

    `scratch` holds 1, 0, then scales and zeros of a tile, `room` numbers each; where a side has no zeros, zeros.
    """
    kind, width, group = field(side, KIND), field(side, WIDTH), field(side, GROUP)
    at = field(side, DATA)
    near = batch * field(side, BATCH_STRIDE) + head * field(side, HEAD_STRIDE)
    if kind == DENSE:
        for i in range(count):
            start = near + (first + i) * field(side, STEP)
            floats(field(side, DTYPE), at, start, width, tile + i * pitch * 4)
        return
    runs, begin = count, first
    if kind != CHANNEL:
        runs, begin = count // group, first // group
    step, dtype = field(side, SCALE_STEP), field(side, SCALE_DTYPE)
    place = batch * field(side, SCALE_BATCH) + head * field(side, SCALE_HEAD) + begin * step
    numbers = runs * step if step else width // group
    scales, zeros = scratch + LANES * 4, scratch + (LANES + room) * 4
    if field(side, EXPANDED):
        floats(dtype, field(side, SCALE), place, numbers, tile)
        expand(tile, numbers, group, scales)
        if field(side, ZERO):
            floats(dtype, field(side, ZERO), place, numbers, tile)
            expand(tile, numbers, group, zeros)
        step *= group
    else:
        floats(dtype, field(side, SCALE), place, numbers, scales)
        if field(side, ZERO):
            floats(dtype, field(side, ZERO), place, numbers, zeros)
    if kind == CHANNEL:
        spread(side, at + near + first * field(side, STEP), count, tile, pitch, scales, zeros, step, scratch)
        put_apart(side, batch, head, first, count, tile, pitch, 1)
        return
    for index in range(runs):
        source = at + near + (begin + index) * width * field(side, STEP)
        apart = index * width * 4
        spread(side, source, width, tile + index * group * 4, pitch, scales + apart, zeros + apart, 1, scratch)
    put_apart(side, batch, head, first, count, tile, 1, pitch)
