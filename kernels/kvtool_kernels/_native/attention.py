"""Attention over one segment of coded or dense entries, tile by tile with an online softmax.

A piece of work is a run of tiles of one KV head, for up to four query rows. Heads come in lanes, which may hold other
numbers of entries in other forms; `schedule.py` deals their tiles out. Threads take workers' shares until none is left;
the one that finishes the last piece of a head merges its pieces.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import float32

from kvtool_kernels._native.products import inner, outer
from kvtool_kernels._native.record import (
    BATCH_STRIDE,
    DATA,
    DENSE,
    DONE,
    DTYPE,
    ENTRIES,
    FP32,
    HEAD_STRIDE,
    KEYS,
    KIND,
    LANE,
    LANES,
    LANES_AT,
    LOGITS,
    LSE,
    OUT,
    P_BATCH,
    P_FIRST,
    P_GROUP,
    P_HEAD,
    P_LANE,
    P_LAST,
    P_SPLIT,
    P_SPLITS,
    PART,
    PIECE,
    PIECES,
    QUERY,
    ROWS,
    SCRATCH,
    SCRATCH_SIZE,
    SOFTCAP,
    STARTS,
    STEP,
    THREAD,
    TILE,
    TOKEN,
    UNITS,
    VALUES,
    WIDTH,
)
from kvtool_kernels._native.simd import (
    address_of,
    divide,
    exp,
    field,
    fma,
    larger,
    largest,
    load,
    read,
    splat,
    store,
    take,
    total,
    write,
)
from kvtool_kernels._native.team import STAMP, compiled
from kvtool_kernels._native.tile import clear, decode, floats, inner_loop

NOTHING = float32(-np.inf)


@inner_loop
def cap_row(row, count, softcap):
    """x → softcap · tanh(x / softcap), tanh y = 1 − 2 / (e^2y + 1)."""
    one, twice = splat(LANES, float32(1.0)), splat(LANES, float32(2.0) / softcap)
    none, cap, minus = splat(LANES, float32(-0.0)), splat(LANES, softcap), splat(LANES, float32(-2.0))
    for i in range(0, count, LANES):
        power = exp(fma(load(FP32, LANES, row, i), twice, none))
        tanh = fma(divide(minus, fma(power, one, one)), one, one)
        store(row, i, fma(tanh, cap, none))


@inner_loop
def softmax(rows, logits, pitch, count, softcap, top, norm, out, width):
    """logits → weights exp(logits − top) in place; `top`, `norm` and `out` move to the new maximum."""
    whole, one, none = count + -count % LANES, splat(LANES, float32(1.0)), splat(LANES, float32(-0.0))
    for r in range(rows):
        row = logits + r * pitch * 4
        if softcap > 0:
            cap_row(row, whole, softcap)
        for i in range(count, whole):
            write(row, i, NOTHING)
        peak = load(FP32, LANES, row, 0)
        for i in range(LANES, whole, LANES):
            peak = larger(peak, load(FP32, LANES, row, i))
        old = read(top, r)
        new = max(old, largest(peak))
        minus, sums = splat(LANES, -new), splat(LANES, float32(0.0))
        for i in range(0, whole, LANES):
            p = exp(fma(load(FP32, LANES, row, i), one, minus))
            store(row, i, p)
            sums = fma(p, one, sums)
        if new > old:
            shrink = exp(splat(LANES, old - new))
            for i in range(0, width, LANES):
                store(out, r * width + i, fma(load(FP32, LANES, out, r * width + i), shrink, none))
            store(norm, r * LANES, fma(load(FP32, LANES, norm, r * LANES), shrink, sums))
        else:
            store(norm, r * LANES, fma(sums, one, load(FP32, LANES, norm, r * LANES)))
        write(top, r, new)


@inner_loop
def attend_split(job, lane, batch, head, begin, end, q, scratch, room, top, norm, out, seen):
    """One piece: out [rows, Dv], not yet normalised, with its maximum and its sum by SIMD lane. Logits before the soft
    cap go to `seen` [rows, entries], if that is somewhere."""
    rows, most, softcap = field(job, ROWS), field(job, TILE), read(job, 2 * SOFTCAP)
    keys, values = lane + KEYS * 8, lane + VALUES * 8
    width, value_width = field(keys, WIDTH), field(values, WIDTH)
    wide, value_wide = width + -width % LANES, value_width + -value_width % LANES
    side_size = 3 * room + LANES
    key_scratch, value_scratch = scratch, scratch + side_size * 4
    logits = scratch + 2 * side_size * 4
    key_tile, value_tile = key_scratch + (2 * room + LANES) * 4, value_scratch + (2 * room + LANES) * 4
    clear(out, rows * value_wide)
    clear(norm, rows * LANES)
    for r in range(rows):
        write(top, r, NOTHING)
    for first in range(begin, end, most):
        count = min(most, end - first)
        clear(logits, rows * most)
        if field(keys, KIND) == TOKEN:
            decode(keys, batch, head, first, count, key_tile, most, key_scratch, room)
            outer(rows, q, wide, width, key_tile, most, logits, most, count)
        else:
            tile, pitch = key_tile, wide
            if field(keys, KIND) == DENSE and field(keys, DTYPE) == FP32 and width == wide:
                near = batch * field(keys, BATCH_STRIDE) + head * field(keys, HEAD_STRIDE)
                pitch = field(keys, STEP)
                tile = field(keys, DATA) + (near + first * pitch) * 4
            else:
                decode(keys, batch, head, first, count, key_tile, wide, key_scratch, room)
            inner(rows, q, wide, wide, tile, pitch, count, logits, most)
        if seen:
            for r in range(rows):
                floats(FP32, logits, r * most, count, seen + (r * field(lane, ENTRIES) + first) * 4)
        softmax(rows, logits, most, count, softcap, top, norm, out, value_wide)
        if field(values, KIND) == TOKEN:
            decode(values, batch, head, first, count, value_tile, most, value_scratch, room)
            inner(rows, logits, most, count, value_tile, most, value_width, out, value_wide)
        else:
            tile, pitch = value_tile, value_wide
            if field(values, KIND) == DENSE and field(values, DTYPE) == FP32 and value_width == value_wide:
                near = batch * field(values, BATCH_STRIDE) + head * field(values, HEAD_STRIDE)
                pitch = field(values, STEP)
                tile = field(values, DATA) + (near + first * pitch) * 4
            else:
                decode(values, batch, head, first, count, value_tile, value_wide, value_scratch, room)
            outer(rows, logits, most, count, tile, pitch, out, value_wide, value_wide)


@inner_loop
def merge_splits(splits, rows, parts, size, wide, out, lse):
    """The pieces of one head and pass → out [rows, Dv] and lse [rows]."""
    near = rows + -rows % LANES
    for r in range(rows):
        peak, norm = NOTHING, float32(0.0)
        for split in range(splits):
            peak = max(peak, read(parts + split * size * 4, r))
        clear(out + r * wide * 4, wide)
        for split in range(splits):
            part = parts + split * size * 4
            weight = exp(splat(LANES, read(part, r) - peak))
            norm += total(fma(weight, load(FP32, LANES, part, near + r * LANES), splat(LANES, float32(-0.0))))
            for i in range(0, wide, LANES):
                value = load(FP32, LANES, part, near + rows * LANES + r * wide + i)
                store(out, r * wide + i, fma(value, weight, load(FP32, LANES, out, r * wide + i)))
        inverse, none = splat(LANES, float32(1.0) / norm), splat(LANES, float32(-0.0))
        for i in range(0, wide, LANES):
            store(out, r * wide + i, fma(load(FP32, LANES, out, r * wide + i), inverse, none))
        write(lse, r, peak + float32(math.log(norm)))


@functools.lru_cache(maxsize=1)
def function() -> int:
    """The compiled function of a job."""
    stamp = STAMP

    def attend(pointer):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        job = address_of(pointer)
        scratch = field(job, SCRATCH) + take(job + THREAD * 8) * field(job, SCRATCH_SIZE)
        rows, lanes, starts = field(job, ROWS), field(job, LANES_AT), field(job, STARTS)
        wide, width = field(lanes + VALUES * 8, WIDTH), field(lanes + KEYS * 8, WIDTH)
        wide, width = wide + -wide % LANES, width + -width % LANES
        room, size = field(job, TILE) * max(wide, width) + LANES, LANES + rows * LANES + rows * wide
        clear(scratch, field(job, SCRATCH_SIZE) // 4)
        for side in range(2):
            write(scratch + side * (3 * room + LANES) * 4, 0, float32(1.0))
        worker = take(job)
        while worker < field(job, UNITS):
            for number in range(field(starts, worker), field(starts, worker + 1)):
                piece = field(job, PIECES) + number * PIECE * 8
                lane, group = lanes + field(piece, P_LANE) * LANE * 8, field(piece, P_GROUP)
                batch, head, entries = field(piece, P_BATCH), field(piece, P_HEAD), field(lane, ENTRIES)
                part = field(job, PART) + number * size * 4
                begin = field(piece, P_FIRST) * field(job, TILE)
                end = min(field(piece, P_LAST) * field(job, TILE), entries)
                q, out = field(job, QUERY) + group * rows * width * 4, part + (LANES + rows * LANES) * 4
                seen = field(job, LOGITS)
                if seen:
                    seen += group * rows * entries * 4
                attend_split(job, lane, batch, head, begin, end, q, scratch, room, part, part + LANES * 4, out, seen)
                splits = field(piece, P_SPLITS)
                if take(field(job, DONE) + group * 8) == splits - 1:
                    parts = field(job, PART) + (number - field(piece, P_SPLIT)) * size * 4
                    out, lse = field(job, OUT) + group * rows * wide * 4, field(job, LSE) + group * rows * 4
                    merge_splits(splits, rows, parts, size, wide, out, lse)
            worker = take(job)

    return compiled("void(voidptr)", attend)
