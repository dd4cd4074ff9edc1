"""Coded entries to dense fp32 [B,K,S,D], tile by tile; threads take pieces of heads until none is left."""

from __future__ import annotations

import functools

from numba import float32

from kvtool_kernels._native.record import (
    CHUNK,
    FIRST_SIDE,
    FP32,
    HEADS,
    KIND,
    LANES,
    OUT,
    SCRATCH,
    SCRATCH_SIZE,
    SPLITS,
    THREAD,
    TILE,
    TOKEN,
    TOKENS,
    UNITS,
    WHOLE,
    WIDTH,
)
from kvtool_kernels._native.simd import address_of, field, read, take, transpose, write
from kvtool_kernels._native.team import STAMP, compiled
from kvtool_kernels._native.tile import clear, decode, floats, inner_loop


@inner_loop
def turn(tile, pitch, count, width, out):
    """out[t, d] = tile[d, t], in square blocks as far as they go; `count` is a multiple of LANES."""
    whole = width - width % LANES
    for t in range(0, count, LANES):
        for d in range(0, whole, LANES):
            transpose(tile + (d * pitch + t) * 4, pitch, out + (t * width + d) * 4, width)
    for d in range(whole, width):
        for t in range(count):
            write(out, t * width + d, read(tile, d * pitch + t))


@functools.lru_cache(maxsize=1)
def function() -> int:
    """The compiled function of a job of one side."""
    stamp = STAMP

    def dequantize(pointer):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        job = address_of(pointer)
        scratch = field(job, SCRATCH) + take(job + THREAD * 8) * field(job, SCRATCH_SIZE)
        side, pitch, tokens = job + FIRST_SIDE * 8, field(job, TILE), field(job, TOKENS)
        splits, heads, width = field(job, SPLITS), field(job, HEADS), field(side, WIDTH)
        wide = width + -width % LANES
        room = pitch * wide + LANES
        tile = scratch + (2 * room + LANES) * 4
        clear(scratch, 2 * room + LANES)
        write(scratch, 0, float32(1.0))
        unit = take(job)
        while unit < field(job, UNITS):
            split, group = unit % splits, unit // splits
            begin = split * field(job, CHUNK)
            end = min(begin + field(job, CHUNK), tokens)
            for first in range(begin, end, pitch):
                count = min(pitch, end - first)
                out = field(job, OUT) + (group * tokens + first) * width * 4
                if field(side, KIND) == TOKEN:
                    decode(side, group // heads, group % heads, first, count, tile, pitch, scratch, room)
                    turn(tile, pitch, count, width, out)
                elif field(side, WHOLE):
                    decode(side, group // heads, group % heads, first, count, out, width, scratch, room)
                else:
                    decode(side, group // heads, group % heads, first, count, tile, wide, scratch, room)
                    for t in range(count):
                        floats(FP32, tile, t * wide, width, out + t * width * 4)
            unit = take(job)

    return compiled("void(voidptr)", dequantize)
