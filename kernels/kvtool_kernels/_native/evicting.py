"""One token attends to dense fp32 entries, its softmax scores them, and one of each head leaves.

The entries of a head are cut into chunks, so that threads have equal shares. The thread that finishes the last chunk of
a head merges its parts, scores its entries from the logits, closes the gap while they are in its cache, and looks for
what is most like the entry that leaves; where all heads go by the mean of their scores, the thread that finishes the
last head of a row does so for all of them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import float32

from kvtool_kernels._native import mixing
from kvtool_kernels._native.attention import merge_splits, softmax
from kvtool_kernels._native.products import inner, outer
from kvtool_kernels._native.record import AT_ONCE, FP32, LANES
from kvtool_kernels._native.simd import (
    address_of,
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
from kvtool_kernels._native.tile import clear, floats, inner_loop

NOTHING, LEAST = float32(-np.inf), float32(1e-12)  # LEAST: length of a key
TILE = 64  # entries at a time
SUM, MEAN, MAX = 0, 1, 2

# The job. Strides count numbers, PITCH those of a row of logits or scores, PAD the zeros before and behind a row that
# is pooled; HEAT is 1 / τ. At NOISES stands the address of the noise of each KV head. If scores are MIXED: ATTENTION,
# GRADIENT and ENTROPY (over all query heads and ln S) are their weights, MADE_BEFORE the outputs of a step before.
# If query heads are scored APART: at PAST stand MANY queries of tokens before, for each; PEAK: pools take the maximum.
(
    NEXT, THREAD, UNITS, SCRATCH, SCRATCH_SIZE, HEADS, GROUP, CHUNKS, ENTRIES, WIDTH, PITCH, PAD, QUERY,
    K_DATA, K_BATCH, K_HEAD, K_STEP, V_DATA, V_BATCH, V_HEAD, V_STEP, OUT, LSE, PARTS, LOGITS, SCORES,
    BEFORE, KNOWN, B_BATCH, B_HEAD, AFTER, GONE, NEAR, LOW, HIGH, NOISES, NOISE_STEP,
    HEAT, HOT, HOW, KERNEL, DECAY, LARGEST, ALIKE, DONE_HEADS, DONE_ROWS,
    MIXED, MADE_BEFORE, CHANGES, ENTROPIES, ATTENTION, GRADIENT, ENTROPY, APART, PEAK, PAST, MANY, FIELDS,
) = range(58)  # fmt: skip


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
def heated(row, noise, heat, whole):
    """Whole vectors of logits → (logits + noise) / τ, in place; their maximum."""
    hot, none = splat(LANES, heat), splat(LANES, float32(-0.0))
    peak = splat(LANES, NOTHING)
    for i in range(0, whole, LANES):
        x = load(FP32, LANES, row, i)
        if noise:
            x = fma(load(FP32, LANES, noise, i), splat(LANES, float32(1.0)), x)
        x = fma(x, hot, none)
        store(row, i, x)
        peak = larger(peak, x)
    return largest(peak)


@inner_loop
def add_row(row, noise, hot, heat, lse, how, entries, target):
    """One query head's p of all entries joins `target`."""
    near = entries - entries % LANES
    for i in range(near, entries + -entries % LANES):
        if i >= entries:
            write(row, i, NOTHING)
    if hot:
        top = heated(row, noise, heat, near)
        for i in range(near, entries):
            x = read(row, i)
            if noise:
                x += read(noise, i)
            x *= heat
            write(row, i, x)
            top = max(top, x)
        lse = top
    one, minus, none = splat(LANES, float32(1.0)), splat(LANES, -lse), splat(LANES, float32(-0.0))
    if not hot:
        for i in range(0, entries, LANES):
            p, old = exp(fma(load(FP32, LANES, row, i), one, minus)), load(FP32, LANES, target, i)
            store(target, i, larger(p, old) if how == MAX else fma(p, one, old))
        return
    sums = splat(LANES, float32(0.0))
    for i in range(0, entries, LANES):
        p = exp(fma(load(FP32, LANES, row, i), one, minus))
        store(row, i, p)
        sums = fma(p, one, sums)
    gains = splat(LANES, float32(1.0) / total(sums))
    for i in range(0, entries, LANES):
        p, old = fma(load(FP32, LANES, row, i), gains, none), load(FP32, LANES, target, i)
        store(target, i, larger(p, old) if how == MAX else fma(p, one, old))


@inner_loop
def pool(padded, kernel, entries, target):
    """The mean of `kernel` places around each, of a row that begins kernel // 2 zeros before the first entry."""
    gain, one = splat(LANES, float32(1.0) / float32(kernel)), splat(LANES, float32(1.0))
    for i in range(0, entries, LANES):
        around = splat(LANES, float32(0.0))
        for place in range(kernel):
            around = fma(load(FP32, LANES, padded, i + place), one, around)
        store(target, i, fma(around, gain, splat(LANES, float32(-0.0))))


@inner_loop
def score_head(job, head, row):
    """The scores of a head's entries, old ones included, to its row of SCORES; `row` has PAD zeros at both ends."""
    group, heads, entries, pitch = field(job, GROUP), field(job, HEADS), field(job, ENTRIES), field(job, PITCH)
    kernel, how, whole = field(job, KERNEL), field(job, HOW), entries + -entries % LANES
    scores = field(job, SCORES) + head * pitch * 4
    target, noise = scores, 0
    if kernel > 1:
        target = row + field(job, PAD) * 4
        clear(row, whole + 2 * field(job, PAD))
    else:
        clear(scores, whole)
    for r in range(group):
        at = head * group + r
        if field(job, NOISES):
            noise = field(field(job, NOISES), head % heads) + r * field(job, NOISE_STEP) * 4
        lse = read(field(job, LSE), at)
        logits = field(job, LOGITS) + at * pitch * 4
        add_row(logits, noise, field(job, HOT), read(job, 2 * HEAT), lse, how, entries, target)
    gain, none = splat(LANES, float32(1.0)), splat(LANES, float32(-0.0))
    if how == MEAN:
        gain = splat(LANES, float32(1.0) / float32(group))
    for i in range(0, entries, LANES):
        store(target, i, fma(load(FP32, LANES, target, i), gain, none))
    if kernel > 1:
        pool(target - kernel // 2 * 4, kernel, entries, scores)
    remember(job, head, scores)


@inner_loop
def add_past(job, head, r, line, spare):
    """What the past queries of query head `r` pay joins `line`, which becomes the mean over those that see an entry."""
    many, entries, pitch = field(job, MANY), field(job, ENTRIES), field(job, PITCH)
    width, heads = field(job, WIDTH), field(job, HEADS)
    queries = field(job, PAST) + (head * field(job, GROUP) + r) * many * width * 4
    k = field(job, K_DATA) + (head // heads * field(job, K_BATCH) + head % heads * field(job, K_HEAD)) * 4
    for low in range(0, many, AT_ONCE):
        rows = min(AT_ONCE, many - low)
        clear(spare, rows * pitch)
        asked = queries + low * width * 4
        inner(rows, asked, width, width, k, field(job, K_STEP), entries - many + low + rows - 1, spare, pitch)
        for n in range(rows):
            count = entries - many + low + n
            add_row(spare + n * pitch * 4, 0, True, read(job, 2 * HEAT), float32(0.0), SUM, count, line)
    mean, none = splat(LANES, float32(1.0) / float32(many + 1)), splat(LANES, float32(-0.0))
    for i in range(0, entries, LANES):
        store(line, i, fma(load(FP32, LANES, line, i), mean, none))
    for seen in range(1, many + 1):
        write(line, entries - seen, read(line, entries - seen) * float32(many + 1) / float32(seen))


@inner_loop
def pool_peak(padded, kernel, entries, target):
    """As `pool`, but the largest: nothing paid is below 0."""
    for i in range(0, entries, LANES):
        top = splat(LANES, float32(0.0))
        for place in range(kernel):
            top = larger(top, load(FP32, LANES, padded, i + place))
        store(target, i, top)


@inner_loop
def score_apart(job, head, row):
    """As `score_head`, query head by query head: the past scores too, or what is pooled is not to be summed before."""
    group, heads, entries, pitch = field(job, GROUP), field(job, HEADS), field(job, ENTRIES), field(job, PITCH)
    kernel, how, pad, whole = field(job, KERNEL), field(job, HOW), field(job, PAD), entries + -entries % LANES
    scores, line, spare = field(job, SCORES) + head * pitch * 4, row + pad * 4, row + (pitch + 2 * pad) * 4
    one, gain, none, noise = splat(LANES, float32(1.0)), splat(LANES, float32(1.0)), splat(LANES, float32(-0.0)), 0
    if how == MEAN:
        gain = splat(LANES, float32(1.0) / float32(group))
    clear(scores, whole)
    for r in range(group):
        at = head * group + r
        if field(job, NOISES):
            noise = field(field(job, NOISES), head % heads) + r * field(job, NOISE_STEP) * 4
        clear(row, whole + 2 * pad)
        logits, lse = field(job, LOGITS) + at * pitch * 4, read(field(job, LSE), at)
        add_row(logits, noise, field(job, HOT), read(job, 2 * HEAT), lse, SUM, entries, line)
        if field(job, MANY):
            add_past(job, head, r, line, spare)
        source = line
        if kernel > 1:
            near, source = line - kernel // 2 * 4, spare
            if field(job, PEAK):
                pool_peak(near, kernel, entries, spare)
            else:
                pool(near, kernel, entries, spare)
        for i in range(0, entries, LANES):
            x, old = load(FP32, LANES, source, i), load(FP32, LANES, scores, i)
            store(scores, i, larger(x, old) if how == MAX else fma(x, one, old))
    for i in range(0, entries, LANES):
        store(scores, i, fma(load(FP32, LANES, scores, i), gain, none))
    remember(job, head, scores)


@inner_loop
def remember(job, head, scores):
    """What a head's entries scored before joins what they score now."""
    heads = field(job, HEADS)
    if field(job, BEFORE):
        before = field(job, BEFORE) + (head // heads * field(job, B_BATCH) + head % heads * field(job, B_HEAD)) * 4
        decay, best = read(job, 2 * DECAY), field(job, LARGEST)
        for i in range(field(job, KNOWN)):
            old, new = decay * read(before, i), read(scores, i)
            write(scores, i, max(new, old) if best else new + old)


@inner_loop
def mix_head(job, head, scratch):
    """What a head's entries are paid, and what they move, to its rows of SCORES and CHANGES."""
    group, heads, entries, pitch = field(job, GROUP), field(job, HEADS), field(job, ENTRIES), field(job, PITCH)
    width, whole, widely = field(job, WIDTH), entries + -entries % LANES, float32(0.0)
    rows, scores = field(job, LOGITS) + head * group * pitch * 4, field(job, SCORES) + head * pitch * 4
    clear(scores, whole)
    for r in range(group):
        widely += mixing.pay(rows + r * pitch * 4, read(field(job, LSE), head * group + r), entries, scores)
    write(field(job, ENTROPIES), head, widely)
    if field(job, MADE_BEFORE):
        changes, at = field(job, CHANGES) + head * pitch * 4, head * group * width * 4
        query, now, before = field(job, QUERY) + at, field(job, OUT) + at, field(job, MADE_BEFORE) + at
        v = field(job, V_DATA) + (head // heads * field(job, V_BATCH) + head % heads * field(job, V_HEAD)) * 4
        clear(changes, whole)
        mixing.moved_head(
            rows, pitch, query, now, before, width, v, field(job, V_STEP), group, entries, scratch, changes
        )


@inner_loop
def mix(job, first):
    """All heads of a row are done, `first` and those that follow: they score the same, but for what they did before."""
    heads, pitch, entries, widely = field(job, HEADS), field(job, PITCH), field(job, ENTRIES), float32(0.0)
    for head in range(first, first + heads):
        widely += read(field(job, ENTROPIES), head)
    changes, scores = 0, field(job, SCORES) + first * pitch * 4
    if field(job, MADE_BEFORE):
        changes = field(job, CHANGES) + first * pitch * 4
    attention, gradient, entropy = read(job, 2 * ATTENTION), read(job, 2 * GRADIENT), read(job, 2 * ENTROPY)
    mixing.blend(scores, changes, heads, pitch, entries, attention, gradient, entropy * widely)
    for head in range(heads):
        remember(job, first + head, scores + head * pitch * 4)


@inner_loop
def average(scores, heads, pitch, entries):
    """Every head's scores become their mean."""
    gain, one = splat(LANES, float32(1.0) / float32(heads)), splat(LANES, float32(1.0))
    for i in range(0, entries, LANES):
        both = splat(LANES, float32(0.0))
        for head in range(heads):
            both = fma(load(FP32, LANES, scores, head * pitch + i), one, both)
        mean = fma(both, gain, splat(LANES, float32(-0.0)))
        for head in range(heads):
            store(scores, head * pitch + i, mean)


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
    elif field(job, APART):
        score_apart(job, head, row)
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
