"""One bit plane of codes into a tile of fp32: one small compiled function per number of bits and bytes.

For each of `count` runs: target[at] = code · weight · scale + zero if the plane is the first (`fresh`), else
target[at] += code · weight · scale. `step` counts bytes, `pitch` and `scale_step` numbers. The parts of a plane are
whole vectors (`span` = LANES) or `span` bytes.
"""

from __future__ import annotations

import functools

from numba import float32

from kvtool_kernels._native.record import FP32, LANES, PER_LANE
from kvtool_kernels._native.simd import codes, fma, load, read, splat, store
from kvtool_kernels._native.team import STAMP, compiled

SIGNATURE = f"void({', '.join(['int64'] * 10)}, float32)"


@functools.lru_cache(maxsize=32)
def per_run(power: int, span: int, fresh: bool) -> int:
    """The function for runs that have one scale each."""
    parts, together, stamp = 8 // power, LANES // span, STAMP

    def decode(source, step, count, length, target, pitch, scales, zeros, scale_step, shift, weight):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        for _ in range(count):
            gain, offset = splat(LANES, read(scales, 0) * weight), splat(LANES, read(zeros, 0))
            for byte in range(0, length, span):
                for part in range(0, parts, together):
                    at = part * length + byte
                    if not fresh:
                        offset = load(FP32, LANES, target, at)
                    store(target, at, fma(codes(span, power, source, byte, part), gain, offset))
            source += step
            target += pitch * 4
            scales += scale_step * 4
            zeros += scale_step * 4

    return compiled(SIGNATURE, decode)


@functools.lru_cache(maxsize=32)
def per_code(power: int, span: int, fresh: bool) -> int:
    """The function for runs of several scales: each serves 2^shift codes."""
    parts, together, stamp = 8 // power, LANES // span, STAMP

    def decode(source, step, count, length, target, pitch, scales, zeros, scale_step, shift, weight):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        for _ in range(count):
            for byte in range(0, length, span):
                for part in range(0, parts, together):
                    at = part * length + byte
                    if shift == PER_LANE:
                        gain, offset = load(FP32, LANES, scales, at), load(FP32, LANES, zeros, at)
                    else:
                        gain, offset = splat(LANES, read(scales, at >> shift)), splat(LANES, read(zeros, at >> shift))
                    if not fresh:
                        offset = load(FP32, LANES, target, at)
                    gain = fma(gain, splat(LANES, weight), splat(LANES, float32(-0.0)))
                    store(target, at, fma(codes(span, power, source, byte, part), gain, offset))
            source += step
            target += pitch * 4
            scales += scale_step * 4
            zeros += scale_step * 4

    return compiled(SIGNATURE, decode)
