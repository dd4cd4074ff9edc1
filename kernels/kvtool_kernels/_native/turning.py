"""Attention over keys that are rebuilt and turned as they are read, tile by tile with an online softmax.

A piece of work is a run of tiles of one unit: the fewest KV heads whose latents, of keys and of values, are nobody
else's. Its latents are decoded once a tile, for all of its query rows; a head's keys are rebuilt, turned in place by
the rows of the tables that positions name, and asked while they lie in a core's cache. Where pairs are neighbours,
they turn into vectors of firsts and of seconds, as queries come (`launch_turning.py`).
"""

from __future__ import annotations

import functools

from numba import float32

from kvtool_kernels._native.attention import NOTHING, merge_splits, softmax
from kvtool_kernels._native.decoding import turn
from kvtool_kernels._native.lanes import alternate
from kvtool_kernels._native.products import inner, many4, outer
from kvtool_kernels._native.record import (
    AT_ONCE,
    BATCH_STRIDE,
    DATA,
    DENSE,
    DONE,
    DTYPE,
    FIRST_SIDE,
    FP32,
    HEAD_STRIDE,
    KIND,
    LANES,
    LSE,
    OUT,
    P_BATCH,
    P_FIRST,
    P_GROUP,
    P_HEAD,
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
    SIDE,
    SOFTCAP,
    STARTS,
    STEP,
    THREAD,
    TILE,
    TOKEN,
    UNITS,
    WIDTH,
)
from kvtool_kernels._native.simd import address_of, field, fma, load, read, splat, store, take, write
from kvtool_kernels._native.team import STAMP, compiled
from kvtool_kernels._native.tile import clear, decode, floats, inner_loop

KEYS, VALUES = FIRST_SIDE, FIRST_SIDE + SIDE
(
    OWN, KEY_LATENTS, VALUE_LATENTS, SHARED, HEAD_WIDTH, RANK, BASIS, BASIS_STEP, OFFSET, OFFSET_STEP, COS, SIN, HALF,
    INTERLEAVED, POSITIONS, POSITIONS_BATCH, POSITIONS_HEAD, ENTRIES, ROOM,
) = range(VALUES + SIDE, VALUES + SIDE + 19)  # fmt: skip
JOB = ROOM + 1  # ROOM: numbers of a tile at most; OWN: query rows of a KV head; SHARED: KV heads of a latent of keys


@inner_loop
def turn_pairs(row, cos, sin, half, interleaved):
    """One key, in place: (a, b) → (a·c − b·s, b·c + a·s)."""
    none, minus = splat(LANES, float32(-0.0)), splat(LANES, float32(-1.0))
    whole, apart = half - half % LANES, half
    for i in range(0, whole, LANES):
        c, s = load(FP32, LANES, cos, i), load(FP32, LANES, sin, i)
        if interleaved:
            x, y = load(FP32, LANES, row, 2 * i), load(FP32, LANES, row, 2 * i + LANES)
            a, b = alternate(x, y, 0), alternate(x, y, 1)
            one, two = 2 * i, 2 * i + LANES
        else:
            a, b = load(FP32, LANES, row, i), load(FP32, LANES, row, apart + i)
            one, two = i, apart + i
        store(row, one, fma(a, c, fma(fma(b, minus, none), s, none)))
        store(row, two, fma(b, c, fma(a, s, none)))
    for i in range(whole, half):
        c1, s1 = read(cos, i), read(sin, i)
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, apart + i)
        a1, b1 = read(row, one), read(row, two)
        write(row, one, a1 * c1 - b1 * s1)
        write(row, two, b1 * c1 + a1 * s1)


@inner_loop
def rebuild(job, latent, at, z, pitch, count, keys, wide):
    """keys [t][wide] = z [t][r] · basis + offset, of head `at` of those that share a latent."""
    rank, shared = field(job, RANK), field(job, SHARED)
    basis = field(job, BASIS) + (latent * field(job, BASIS_STEP) + at * wide) * 4
    offset = field(job, OFFSET)
    for t in range(count):
        if offset:
            floats(FP32, offset, latent * field(job, OFFSET_STEP) + at * wide, wide, keys + t * wide * 4)
        else:
            clear(keys + t * wide * 4, wide)
    whole = count - count % 4
    for t in range(0, whole, 4):
        many4(z + t * pitch * 4, pitch, rank, basis, shared * wide, keys + t * wide * 4, wide, wide)
    if whole < count:
        z, keys = z + whole * pitch * 4, keys + whole * wide * 4
        outer(count - whole, z, pitch, rank, basis, shared * wide, keys, wide, wide)


@inner_loop
def ask(job, batch, unit, first, count, q, scratch, room, spare, logits):
    """Logits [rows, entries of a tile] of one unit."""
    most, own, shared, wide = field(job, TILE), field(job, OWN), field(job, SHARED), field(job, HEAD_WIDTH)
    keys, rank, half = job + KEYS * 8, field(job, RANK), field(job, HALF)
    width, kind = field(keys, WIDTH), field(keys, KIND)
    tile, rebuilt = scratch + (2 * room + LANES) * 4, spare + room * 4
    for part in range(field(job, KEY_LATENTS)):
        latent = unit * field(job, KEY_LATENTS) + part
        z, pitch = tile, width + -width % LANES
        if kind == TOKEN:
            decode(keys, batch, latent, first, count, tile, most, scratch, room)
            turn(tile, most, count, width, spare)
            z, pitch = spare, width
        elif kind == DENSE and field(keys, DTYPE) == FP32 and rank:
            pitch = field(keys, STEP)
            near = batch * field(keys, BATCH_STRIDE) + latent * field(keys, HEAD_STRIDE)
            z = field(keys, DATA) + (near + first * pitch) * 4
        else:
            decode(keys, batch, latent, first, count, tile, pitch, scratch, room)
        for at in range(shared):
            head = part * shared + at
            near = batch * field(job, POSITIONS_BATCH) + (latent * shared + at) * field(job, POSITIONS_HEAD) + first
            place, far = z + at * wide * 4, pitch
            if rank:
                rebuild(job, latent, at, z, pitch, count, rebuilt, wide)
                place, far = rebuilt, wide
            for t in range(count):
                turned = field(field(job, POSITIONS), near + t) * half * 4
                cos, sin = field(job, COS) + turned, field(job, SIN) + turned
                turn_pairs(place + t * far * 4, cos, sin, half, field(job, INTERLEAVED))
            for r in range(0, own, AT_ONCE):
                row = head * own + r
                asked, found = q + row * wide * 4, logits + row * most * 4
                inner(min(AT_ONCE, own - r), asked, wide, wide, place, far, count, found, most)


@inner_loop
def gather(job, batch, unit, first, count, weights, scratch, room, out):
    """out += weights · values, of one unit."""
    most, values, latents = field(job, TILE), job + VALUES * 8, field(job, VALUE_LATENTS)
    width, kind = field(values, WIDTH), field(values, KIND)
    wide, each = width + -width % LANES, field(job, ROWS) // latents
    for part in range(latents):
        latent = unit * latents + part
        tile, pitch = scratch + (2 * room + LANES) * 4, wide
        if kind == TOKEN:
            pitch = most
            decode(values, batch, latent, first, count, tile, pitch, scratch, room)
        elif kind == DENSE and field(values, DTYPE) == FP32 and width == wide:
            pitch = field(values, STEP)
            near = batch * field(values, BATCH_STRIDE) + latent * field(values, HEAD_STRIDE)
            tile = field(values, DATA) + (near + first * pitch) * 4
        else:
            decode(values, batch, latent, first, count, tile, pitch, scratch, room)
        for r in range(part * each, (part + 1) * each, AT_ONCE):
            some, weight, sums = min(AT_ONCE, (part + 1) * each - r), weights + r * most * 4, out + r * wide * 4
            if kind == TOKEN:
                inner(some, weight, most, count, tile, pitch, width, sums, wide)
            else:
                outer(some, weight, most, count, tile, pitch, sums, wide, wide)


@inner_loop
def attend_piece(job, batch, unit, begin, end, q, scratch, room, part, near):
    """One piece: its maxima, sums by SIMD lane and out [rows, Dv], not yet normalised, at `part`."""
    rows, most, softcap = field(job, ROWS), field(job, TILE), read(job, 2 * SOFTCAP)
    width = field(job + VALUES * 8, WIDTH)
    wide = width + -width % LANES
    top, norm, out = part, part + near * 4, part + (near + rows * LANES) * 4
    side = 3 * room + LANES
    spare = scratch + 2 * side * 4
    logits = spare + 2 * room * 4
    clear(out, rows * wide)
    clear(norm, rows * LANES)
    for r in range(rows):
        write(top, r, NOTHING)
    for first in range(begin, end, most):
        count = min(most, end - first)
        clear(logits, rows * most)
        ask(job, batch, unit, first, count, q, scratch, room, spare, logits)
        softmax(rows, logits, most, count, softcap, top, norm, out, wide)
        gather(job, batch, unit, first, count, logits, scratch + side * 4, room, out)


@functools.lru_cache(maxsize=1)
def function() -> int:
    """The compiled function of a job."""
    stamp = STAMP

    def attend(pointer):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        job = address_of(pointer)
        scratch = field(job, SCRATCH) + take(job + THREAD * 8) * field(job, SCRATCH_SIZE)
        rows, starts, room = field(job, ROWS), field(job, STARTS), field(job, ROOM)
        width, value_width = field(job, HEAD_WIDTH), field(job + VALUES * 8, WIDTH)
        wide, near = value_width + -value_width % LANES, rows + -rows % LANES
        size = near + rows * LANES + rows * wide
        clear(scratch, field(job, SCRATCH_SIZE) // 4)
        for side in range(2):
            write(scratch + side * (3 * room + LANES) * 4, 0, float32(1.0))
        worker = take(job)
        while worker < field(job, UNITS):
            for number in range(field(starts, worker), field(starts, worker + 1)):
                piece = field(job, PIECES) + number * PIECE * 8
                batch, unit, group = field(piece, P_BATCH), field(piece, P_HEAD), field(piece, P_GROUP)
                begin, end = field(piece, P_FIRST) * field(job, TILE), field(piece, P_LAST) * field(job, TILE)
                part, q = field(job, PART) + number * size * 4, field(job, QUERY) + group * rows * width * 4
                attend_piece(job, batch, unit, begin, min(end, field(job, ENTRIES)), q, scratch, room, part, near)
                splits = field(piece, P_SPLITS)
                if take(field(job, DONE) + group * 8) == splits - 1:
                    parts = field(job, PART) + (number - field(piece, P_SPLIT)) * size * 4
                    out, lse = field(job, OUT) + group * rows * wide * 4, field(job, LSE) + group * rows * 4
                    merge_splits(splits, rows, parts, size, wide, out, lse)
            worker = take(job)

    return compiled("void(voidptr)", attend)
