"""Products of a few rows of weights with a tile, for 1 to 4 rows: the sums stay in registers."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
from numba import float32

from kvtool_kernels._native.record import FP32, LANES
from kvtool_kernels._native.simd import fma, load, read, splat, store, total, write
from kvtool_kernels._native.sums import add_inners, add_outer, put_totals, zeros
from kvtool_kernels._native.tile import inner_loop

# Are there registers for LANES sums of LANES numbers? Where Numba is told to compile for another processor: no.
FOR_THIS = numba.config.CPU_NAME is None  # type: ignore[attr-defined]  # it fills its module in when it is imported
WIDE_REGISTERS = FOR_THIS and llvmlite.binding.get_host_cpu_features().get("avx512f", False)


def _outer(rows: int, vectors: int) -> Any:
    """`outer` for exactly `rows` rows; `vectors` of each row are summed at a time."""
    sums_at_once, block = rows * vectors, vectors * LANES

    @inner_loop
    def outer(weights, stride, count, tile, pitch, out, out_pitch, lanes):
        one, whole = splat(LANES, float32(1.0)), lanes - lanes % block
        for lane in range(0, whole, block):
            sums = zeros(sums_at_once)
            for i in range(count):
                sums = add_outer(sums, rows, weights + i * 4, stride, tile + (i * pitch + lane) * 4)
            for r in range(rows):
                for c in range(vectors):
                    at = r * out_pitch + lane + c * LANES
                    store(out, at, fma(sums[r * vectors + c], one, load(FP32, LANES, out, at)))
        for lane in range(whole, lanes, LANES):
            rest = zeros(rows)
            for i in range(count):
                rest = add_outer(rest, rows, weights + i * 4, stride, tile + (i * pitch + lane) * 4)
            for r in range(rows):
                at = r * out_pitch + lane
                store(out, at, fma(rest[r], one, load(FP32, LANES, out, at)))

    return outer


def _inner(rows: int) -> Any:
    """`inner` for exactly `rows` rows: as many columns at a time as give LANES sums, where registers hold them."""
    block = LANES // (4 if rows > 2 else rows) if WIDE_REGISTERS else 1
    sums_at_once = rows * block

    @inner_loop
    def inner(weights, stride, lanes, tile, pitch, count, out, out_pitch):
        whole = count - count % block if block > 1 else 0
        for i in range(0, whole, block):
            many = zeros(sums_at_once)
            for lane in range(0, lanes, LANES):
                many = add_inners(many, rows, weights + lane * 4, stride, tile + (i * pitch + lane) * 4, pitch)
            put_totals(many, rows, out + i * 4, out_pitch)
        for i in range(whole, count):
            sums = zeros(rows)
            for lane in range(0, lanes, LANES):
                sums = add_inners(sums, rows, weights + lane * 4, stride, tile + (i * pitch + lane) * 4, pitch)
            for r in range(rows):
                at = r * out_pitch + i
                write(out, at, read(out, at) + total(sums[r]))

    return inner


_outer1, _outer2, _outer3, _outer4 = _outer(1, 4), _outer(2, 4), _outer(3, 2), _outer(4, 2)
many4 = _outer(4, 4)  # for wide tiles: every number that is loaded serves four times
_inner1, _inner2, _inner3, _inner4 = _inner(1), _inner(2), _inner(3), _inner(4)


@inner_loop
def outer(rows, weights, stride, count, tile, pitch, out, out_pitch, lanes):
    """out[r, lane] += Σ_i weights[r, i] · tile[i, lane], for `lanes` in whole vectors."""
    if rows == 1:
        _outer1(weights, stride, count, tile, pitch, out, out_pitch, lanes)
    elif rows == 2:
        _outer2(weights, stride, count, tile, pitch, out, out_pitch, lanes)
    elif rows == 3:
        _outer3(weights, stride, count, tile, pitch, out, out_pitch, lanes)
    else:
        _outer4(weights, stride, count, tile, pitch, out, out_pitch, lanes)


@inner_loop
def inner(rows, weights, stride, lanes, tile, pitch, count, out, out_pitch):
    """out[r, i] += Σ_lane weights[r, lane] · tile[i, lane], i < count."""
    if rows == 1:
        _inner1(weights, stride, lanes, tile, pitch, count, out, out_pitch)
    elif rows == 2:
        _inner2(weights, stride, lanes, tile, pitch, count, out, out_pitch)
    elif rows == 3:
        _inner3(weights, stride, lanes, tile, pitch, count, out, out_pitch)
    else:
        _inner4(weights, stride, lanes, tile, pitch, count, out, out_pitch)
