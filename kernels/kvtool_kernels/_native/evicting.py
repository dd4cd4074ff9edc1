"""One token attends to dense fp32 entries, its softmax scores them, and one of each head leaves.

The entries of a head are cut into chunks, so that threads have equal shares. The thread that finishes the last chunk of
a head merges its parts, scores its entries from the logits, closes the gap while they are in its cache, and looks for
what is most like the entry that leaves; where all heads go by the mean of their scores, the thread that finishes the
last head of a row does so for all of them.
"""

from __future__ import annotations

import functools
import math

from numba import float32

from kvtool_kernels._native.attention import merge_splits, softmax
from kvtool_kernels._native.products import inner, outer
from kvtool_kernels._native.record import AT_ONCE, FP32, LANES
from kvtool_kernels._native.scoring import (
    AFTER,
    ALIKE,
    CHUNKS,
    DONE_HEADS,
    DONE_ROWS,
    ENTRIES,
    GONE,
    GROUP,
    HEADS,
    HIGH,
    K_BATCH,
    K_DATA,
    K_HEAD,
    K_STEP,
    LOGITS,
    LOW,
    LSE,
    MIXED,
    NEAR,
    NOTHING,
    OUT,
    PARTS,
    PITCH,
    QUERY,
    SCORES,
    SCRATCH,
    SCRATCH_SIZE,
    THREAD,
    UNITS,
    V_BATCH,
    V_DATA,
    V_HEAD,
    V_STEP,
    WIDTH,
    average,
    mix,
    mix_head,
    score_head,
)
from kvtool_kernels._native.simd import (
    address_of,
    field,
    fma,
    load,
    read,
    splat,
    store,
    take,
    total,
    write,
)
from kvtool_kernels._native.team import STAMP, compiled
from kvtool_kernels._native.tile import clear, floats, inner_loop

LEAST = float32(1e-12)  # length of a key
TILE = 64  # entries at a time


@inner_loop
def attend_chunk(job, head, begin, end, tile, part):
    """Entries begin … end − 1 of a head (of all rows'): maxima, sums by lane and sums of values to `part`."""
    width, group, heads = field(job, WIDTH), field(job, GROUP), field(job, HEADS)
    row, own = head // heads, head % heads
    k = field(job, K_DATA) + (row * field(job, K_BATCH) + own * field(job, K_HEAD)) * 4
    v = field(job, V_DATA) + (row * field(job, V_BATCH) + own * field(job, V_HEAD)) * 4
    key_step, value_step, pitch = field(job, K_STEP), field(job, V_STEP), field(job, PITCH)
    sums = part + LANES * 4
    values = sums + group * LANES * 4
    clear(part, LANES + group * LANES + group * width)
    for r in range(group):
        write(part, r, NOTHING)
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        for low in range(0, group, AT_ONCE):
            rows = min(AT_ONCE, group - low)
            clear(tile, rows * TILE)
            q = field(job, QUERY) + (head * group + low) * width * 4
            inner(rows, q, width, width, k + first * key_step * 4, key_step, count, tile, TILE)
            for r in range(rows):
                seen = field(job, LOGITS) + ((head * group + low + r) * pitch + first) * 4
                floats(FP32, tile, r * TILE, count, seen)
            out = values + low * width * 4
            softmax(rows, tile, TILE, count, float32(0.0), part + low * 4, sums + low * LANES * 4, out, width)
            outer(rows, tile, TILE, count, v + first * value_step * 4, value_step, out, width, width)


@inner_loop
def to_the_end(entries, place, last, step, width, row):
    """The entry at `place` becomes the last, those behind it move up; `row` holds it meanwhile."""
    floats(FP32, entries, place * step, width, row)
    for entry in range(place, last):
        for c in range(0, width, LANES):
            store(entries, entry * step + c, load(FP32, LANES, entries, (entry + 1) * step + c))
    floats(FP32, row, 0, width, entries + last * step * 4)


@inner_loop
def most_like_the_last(keys, last, step, width, found):
    """The largest cosine of key `last` with one before it, and the place of that one, to `found`."""
    own, best, place, size = keys + last * step * 4, NOTHING, 0, float32(0.0)
    for i in range(last + 1):
        both, square = splat(LANES, float32(0.0)), splat(LANES, float32(0.0))
        for c in range(0, width, LANES):
            x = load(FP32, LANES, keys, i * step + c)
            both = fma(x, load(FP32, LANES, own, c), both)
            square = fma(x, x, square)
        size = max(float32(math.sqrt(total(square))), LEAST)
        likeness = total(both) / size
        if i < last and likeness > best:
            best, place = likeness, i
    write(found, 0, best / size)
    write(found, 1, float32(place))  # exact: below 2^24


@inner_loop
def evict(job, head, row):
    """The worst free entry of a head leaves, unless none is free; the others' scores go to AFTER. `row`: scratch."""
    heads, entries, low, high = field(job, HEADS), field(job, ENTRIES), field(job, LOW), field(job, HIGH)
    scores, width = field(job, SCORES) + head * field(job, PITCH) * 4, field(job, WIDTH)
    if low == high:
        floats(FP32, scores, 0, entries, field(job, AFTER) + head * entries * 4)
        return
    gone, worst = low, read(scores, low)
    for i in range(low + 1, high):
        score = read(scores, i)
        if score < worst:
            gone, worst = i, score
    after = field(job, AFTER) + head * (entries - 1) * 4
    floats(FP32, scores, 0, gone, after)
    floats(FP32, scores, gone + 1, entries - 1 - gone, after + gone * 4)
    write(field(job, GONE), head, float32(gone))  # exact: below 2^24
    batch, own = head // heads, head % heads
    k = field(job, K_DATA) + (batch * field(job, K_BATCH) + own * field(job, K_HEAD)) * 4
    v = field(job, V_DATA) + (batch * field(job, V_BATCH) + own * field(job, V_HEAD)) * 4
    to_the_end(k, gone, entries - 1, field(job, K_STEP), width, row)
    to_the_end(v, gone, entries - 1, field(job, V_STEP), width, row)
    if field(job, NEAR):
        most_like_the_last(k, entries - 1, field(job, K_STEP), width, field(job, NEAR) + head * 8)


@inner_loop
def finish_head(job, head, row):
    """All chunks of a head are done."""
    heads, group, width, chunks = field(job, HEADS), field(job, GROUP), field(job, WIDTH), field(job, CHUNKS)
    size = LANES + group * LANES + group * width
    parts = field(job, PARTS) + head * chunks * size * 4
    out, lse = field(job, OUT) + head * group * width * 4, field(job, LSE) + head * group * 4
    merge_splits(chunks, group, parts, size, width, out, lse)
    if field(job, MIXED):
        mix_head(job, head, row)
    else:
        score_head(job, head, row)
    if not field(job, ALIKE):
        evict(job, head, row)
    elif take(field(job, DONE_ROWS) + head // heads * 8) == heads - 1:
        first = head // heads * heads
        if field(job, MIXED):
            mix(job, first)
        average(field(job, SCORES) + first * field(job, PITCH) * 4, heads, field(job, PITCH), field(job, ENTRIES))
        for each in range(heads):
            evict(job, first + each, row)


@functools.lru_cache(maxsize=1)
def function() -> int:
    """The compiled function of a job."""
    stamp = STAMP

    def attend_evict(pointer):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        job = address_of(pointer)
        scratch = field(job, SCRATCH) + take(job + THREAD * 8) * field(job, SCRATCH_SIZE)
        chunks, entries, group = field(job, CHUNKS), field(job, ENTRIES), field(job, GROUP)
        size = LANES + group * LANES + group * field(job, WIDTH)
        unit = take(job)
        while unit < field(job, UNITS):
            head, chunk = unit // chunks, unit % chunks
            begin, end = entries * chunk // chunks, entries * (chunk + 1) // chunks
            attend_chunk(job, head, begin, end, scratch, field(job, PARTS) + unit * size * 4)
            if take(field(job, DONE_HEADS) + head * 8) == chunks - 1:
                finish_head(job, head, scratch)
            unit = take(job)

    return compiled("void(voidptr)", attend_evict)
