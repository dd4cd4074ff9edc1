"""The job of `evicting.py`, and what a decode step's query, and earlier ones, score the entries of a head.

    logits → (noise, heat) → softmax → mean over the queries that see an entry → pool → over the group → and before

or a mixture (`mixing.py`). Rows of scores are whole vectors; what stands behind the last entry scores nothing.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from kvtool_kernels._native import mixing
from kvtool_kernels._native.products import inner
from kvtool_kernels._native.record import AT_ONCE, FP32, LANES
from kvtool_kernels._native.simd import exp, field, fma, larger, largest, load, read, splat, store, total, write
from kvtool_kernels._native.tile import clear, inner_loop

NOTHING = float32(-np.inf)
SUM, MEAN, MAX = 0, 1, 2

# The job. Strides count numbers, PITCH those of a row of logits or scores, PAD the zeros before and behind a row that
# is pooled; HEAT is 1 / τ. At NOISES stands the address of the noise of each KV head. If scores are MIXED: ATTENTION,
# GRADIENT and ENTROPY (over all query heads and ln S) are their weights, MADE_BEFORE the outputs of a step before.
# At PAST stand MANY queries of tokens before, for each query head; PEAK: pools take the maximum.
(
    NEXT, THREAD, UNITS, SCRATCH, SCRATCH_SIZE, HEADS, GROUP, CHUNKS, ENTRIES, WIDTH, PITCH, PAD, QUERY,
    K_DATA, K_BATCH, K_HEAD, K_STEP, V_DATA, V_BATCH, V_HEAD, V_STEP, OUT, LSE, PARTS, LOGITS, SCORES,
    BEFORE, KNOWN, B_BATCH, B_HEAD, AFTER, GONE, NEAR, LOW, HIGH, NOISES, NOISE_STEP,
    HEAT, HOT, HOW, KERNEL, DECAY, LARGEST, ALIKE, DONE_HEADS, DONE_ROWS,
    MIXED, MADE_BEFORE, CHANGES, ENTROPIES, ATTENTION, GRADIENT, ENTROPY, PEAK, PAST, MANY, FIELDS,
) = range(57)  # fmt: skip


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
def pool(padded, kernel, peak, entries, target):
    """The mean of `kernel` places around each, or their peak, of a row that begins kernel // 2 zeros before the first
    entry, in which nothing is below 0."""
    one, none = splat(LANES, float32(1.0)), splat(LANES, float32(-0.0))
    gain = splat(LANES, float32(1.0) / float32(kernel))
    for i in range(0, entries, LANES):
        around = splat(LANES, float32(0.0))
        for place in range(kernel):
            x = load(FP32, LANES, padded, i + place)
            around = larger(around, x) if peak else fma(x, one, around)
        store(target, i, around if peak else fma(around, gain, none))


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
def score_head(job, head, row):
    """The scores of a head's entries, old ones included, to its row of SCORES; `row`: scratch."""
    group, heads, entries, pitch = field(job, GROUP), field(job, HEADS), field(job, ENTRIES), field(job, PITCH)
    kernel, how, pad, whole = field(job, KERNEL), field(job, HOW), field(job, PAD), entries + -entries % LANES
    scores, line, spare = field(job, SCORES) + head * pitch * 4, row + pad * 4, row + (pitch + 2 * pad) * 4
    one, none, noise = splat(LANES, float32(1.0)), splat(LANES, float32(-0.0)), 0
    clear(scores, whole)
    for r in range(group):
        at = head * group + r
        if field(job, NOISES):
            noise = field(field(job, NOISES), head % heads) + r * field(job, NOISE_STEP) * 4
        logits, lse = field(job, LOGITS) + at * pitch * 4, read(field(job, LSE), at)
        if kernel == 1 and not field(job, MANY):
            add_row(logits, noise, field(job, HOT), read(job, 2 * HEAT), lse, how, entries, scores)
            continue
        clear(row, whole + 2 * pad)
        add_row(logits, noise, field(job, HOT), read(job, 2 * HEAT), lse, SUM, entries, line)
        if field(job, MANY):
            add_past(job, head, r, line, spare)
        source = line
        if kernel > 1:
            source = spare
            pool(line - kernel // 2 * 4, kernel, field(job, PEAK), entries, spare)
        for i in range(0, entries, LANES):
            x, old = load(FP32, LANES, source, i), load(FP32, LANES, scores, i)
            store(scores, i, larger(x, old) if how == MAX else fma(x, one, old))
    if how == MEAN:
        gain = splat(LANES, float32(1.0) / float32(group))
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
