"""The terms of a mixed score (`kvtool_kernels/mixing.py`), for one KV head of fp32 entries, and their mixture."""

from __future__ import annotations

from numba import float32

from kvtool_kernels._native.products import inner
from kvtool_kernels._native.record import AT_ONCE, FP32, LANES
from kvtool_kernels._native.simd import (
    exp,
    fma,
    highest,
    larger,
    load,
    lowest,
    maximum,
    minimum,
    read,
    splat,
    store,
    total,
    write,
)
from kvtool_kernels._native.tile import clear, inner_loop

TILE = 64  # entries at a time
NOWHERE = float32(-1e30)  # a logit that nothing is paid for


@inner_loop
def pay(row, lse, entries, target):
    """A row of logits becomes p, in whole vectors, and joins `target`; the entropy of the row."""
    whole = entries + -entries % LANES
    for i in range(entries, whole):
        write(row, i, NOWHERE)
    one, minus, both = splat(LANES, float32(1.0)), splat(LANES, -lse), splat(LANES, float32(0.0))
    for i in range(0, whole, LANES):
        x = fma(load(FP32, LANES, row, i), one, minus)
        p = exp(x)
        both = fma(p, x, both)
        store(row, i, p)
        store(target, i, fma(p, one, load(FP32, LANES, target, i)))
    return -total(both)


@inner_loop
def steepness(now, before, query, width, slope, found):
    """g = 2 (now − before) / D to `slope`; ‖g‖₁, g · now and ‖query‖₁ to `found`."""
    gain = float32(2.0) / float32(width)
    size, along, reach = float32(0.0), float32(0.0), float32(0.0)
    for c in range(width):
        g = gain * (read(now, c) - read(before, c))
        write(slope, c, g)
        size += abs(g)
        along += g * read(now, c)
        reach += abs(read(query, c))
    write(found, 0, size)
    write(found, 1, along)
    write(found, 2, reach)


@inner_loop
def move(p, turned, found, first, count, target):
    """target_j += p_j (‖g‖₁ + ‖query‖₁ |g·v_j − g·now|), of `count` entries from `first` on, in whole vectors."""
    one, size, reach = splat(LANES, float32(1.0)), splat(LANES, read(found, 0)), splat(LANES, read(found, 2))
    up, down, minus = splat(LANES, read(found, 1)), splat(LANES, -read(found, 1)), splat(LANES, float32(-1.0))
    for i in range(0, count, LANES):
        x = load(FP32, LANES, turned, i)
        apart = larger(fma(x, one, down), fma(x, minus, up))
        step = fma(apart, reach, size)
        store(target, first + i, fma(load(FP32, LANES, p, first + i), step, load(FP32, LANES, target, first + i)))


@inner_loop
def moved_head(rows, pitch, query, now, before, width, v, step, group, entries, scratch, target):
    """What a head's entries, of which `group` rows of p stand at `rows`, would move joins `target`."""
    found, tile = scratch + group * width * 4, scratch + group * (width + LANES) * 4
    for r in range(group):
        at = r * width * 4
        steepness(now + at, before + at, query + at, width, scratch + at, found + r * LANES * 4)
    for first in range(0, entries, TILE):
        count = min(TILE, entries - first)
        for low in range(0, group, AT_ONCE):
            few = min(AT_ONCE, group - low)
            clear(tile, few * TILE)
            inner(few, scratch + low * width * 4, width, width, v + first * step * 4, step, count, tile, TILE)
            for r in range(few):
                paid = rows + (low + r) * pitch * 4
                move(paid, tile + r * TILE * 4, found + (low + r) * LANES * 4, first, count, target)


@inner_loop
def add_rows(source, heads, pitch, entries):
    """The first of some rows becomes the sum of all."""
    one = splat(LANES, float32(1.0))
    for head in range(1, heads):
        for i in range(0, entries, LANES):
            x = fma(load(FP32, LANES, source, head * pitch + i), one, load(FP32, LANES, source, i))
            store(source, i, x)


@inner_loop
def scale_row(source, entries, weight):
    """To 0 … weight over the entries; 0 where all are equal. What follows them in the last vector is no matter."""
    near = entries - entries % LANES
    low, high = read(source, 0), read(source, 0)
    least, most = splat(LANES, low), splat(LANES, high)
    for i in range(0, near, LANES):
        x = load(FP32, LANES, source, i)
        least, most = minimum(least, x), maximum(most, x)
    low, high = lowest(least), highest(most)
    for i in range(near, entries):
        low, high = min(low, read(source, i)), max(high, read(source, i))
    gain = float32(0.0)
    if high > low:
        gain = weight / (high - low)
    gains, minus = splat(LANES, gain), splat(LANES, -low)
    one, none = splat(LANES, float32(1.0)), splat(LANES, float32(-0.0))
    for i in range(0, entries, LANES):
        store(source, i, fma(fma(load(FP32, LANES, source, i), one, minus), gains, none))


@inner_loop
def blend(scores, changes, heads, pitch, entries, attention, gradient, bonus):
    """What heads' entries are paid, and what they move, each head's in a row: in every row their mixture, to whose last
    entry `bonus` is added. changes = 0: nothing moved."""
    one = splat(LANES, float32(1.0))
    add_rows(scores, heads, pitch, entries)
    scale_row(scores, entries, attention)
    if changes:
        add_rows(changes, heads, pitch, entries)
        scale_row(changes, entries, gradient)
        for i in range(0, entries, LANES):
            store(scores, i, fma(load(FP32, LANES, changes, i), one, load(FP32, LANES, scores, i)))
    write(scores, entries - 1, read(scores, entries - 1) + bonus)
    for head in range(1, heads):
        for i in range(0, entries, LANES):
            store(scores, head * pitch + i, load(FP32, LANES, scores, i))
