"""One bit plane of codes into a tile of fp32: one small compiled function per number of bits and bytes.

For each of `count` runs: target[at] = code · weight · scale + zero if the plane is the first (`fresh`), else
target[at] += code · weight · scale. `step` counts bytes, `pitch` and `scale_step` numbers. The parts of a plane are
whole vectors (`span` = LANES) or `span` bytes; or any number of bytes (`span` = 0), where a part's last vector goes on
behind it: what lies there comes later in a first plane, and in the next ones nothing is added to it. So a tile needs
a vector more than it holds.
"""

from __future__ import annotations

import functools

from numba import float32

from kvtool_kernels._native.lanes import codes_below
from kvtool_kernels._native.record import FP32, LANES, PER_LANE, PER_RUN
from kvtool_kernels._native.simd import codes, fma, load, read, splat, store
from kvtool_kernels._native.team import STAMP, compiled

SIGNATURE = f"void({', '.join(['int64'] * 10)}, float32)"


@functools.lru_cache(maxsize=32)
def per_run(power: int, span: int, fresh: bool) -> int:
    """The function for runs that have one scale each."""
    if not span:
        return _ragged(power, fresh)
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
    """The function for runs of several scales: each serves 2^shift codes; one code where a plane is not whole."""
    if not span:
        return _ragged(power, fresh)
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


@functools.lru_cache(maxsize=16)
def _ragged(power: int, fresh: bool) -> int:
    """The function for planes whose parts are not whole vectors."""
    parts, stamp = 8 // power, STAMP

    def decode(source, step, count, length, target, pitch, scales, zeros, scale_step, shift, weight):
        stamp  # noqa: B018  # closed over: part of the key under which the code is kept
        for _ in range(count):
            for part in range(parts):
                for byte in range(0, length, LANES):
                    at = part * length + byte
                    if shift == PER_RUN:
                        gain, offset = splat(LANES, read(scales, 0)), splat(LANES, read(zeros, 0))
                    else:
                        gain, offset = load(FP32, LANES, scales, at), load(FP32, LANES, zeros, at)
                    if not fresh:
                        offset = load(FP32, LANES, target, at)
                    gain = fma(gain, splat(LANES, weight), splat(LANES, float32(-0.0)))
                    code = codes_below(power, source + byte, min(length - byte, LANES), part)
                    store(target, at, fma(code, gain, offset))
            source += step
            target += pitch * 4
            scales += scale_step * 4
            zeros += scale_step * 4

    return compiled(SIGNATURE, decode)
