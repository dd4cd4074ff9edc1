"""Sums of products in registers: rows of weights with vectors of a tile."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from kvtool_kernels._native.simd import (
    FLOAT,
    INT,
    LANES,
    LONG,
    WIDE,
    WIDE_TYPE,
    Builder,
    everywhere,
    multiply_add,
    operation,
    pointer_to,
)


@operation
def zeros(typing: Any, count: Any) -> Any:
    """`count` accumulators."""
    kind = types.UniTuple(WIDE, count.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return ir.Constant(context.get_value_type(kind), None)

    return kind(count), generate


@operation
def add_outer(typing: Any, sums: Any, rows: Any, weights: Any, stride: Any, tile: Any) -> Any:
    """sums[r, c] += weights[r · stride] · tile[c], where c counts vectors; `weights` and `tile` are addresses."""
    count, height = len(sums), rows.literal_value
    width = count // height

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        sums, _, weights, stride, tile = given
        kind = ir.VectorType(FLOAT, LANES)
        loaded = [builder.load(pointer_to(builder, tile, LONG(c * LANES), FLOAT, kind), align=4) for c in range(width)]
        for r in range(height):
            place = pointer_to(builder, weights, builder.mul(stride, LONG(r)), FLOAT, FLOAT)
            weight = everywhere(builder, builder.load(place), LANES)
            for c, vector in enumerate(loaded):
                at = r * width + c
                sums = builder.insert_value(
                    sums, multiply_add(builder, weight, vector, builder.extract_value(sums, at)), at
                )
        return sums

    return sums(sums, rows, weights, stride, tile), generate


@operation
def add_inners(typing: Any, sums: Any, rows: Any, weights: Any, stride: Any, tile: Any, pitch: Any) -> Any:
    """sums[r, i] += weights[r · stride ...] · tile[i · pitch ...] by lane; `weights` and `tile` are addresses."""
    height = rows.literal_value
    width = len(sums) // height

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        sums, _, weights, stride, tile, pitch = given

        def loaded(address: ir.Value, step: ir.Value, count: int) -> list[ir.Value]:
            places = [pointer_to(builder, address, builder.mul(step, LONG(i)), FLOAT, WIDE_TYPE) for i in range(count)]
            return [builder.load(place, align=4) for place in places]

        vectors = loaded(tile, pitch, width)
        for r, weight in enumerate(loaded(weights, stride, height)):
            for i, vector in enumerate(vectors):
                at = r * width + i
                sums = builder.insert_value(
                    sums, multiply_add(builder, weight, vector, builder.extract_value(sums, at)), at
                )
        return sums

    return sums(sums, rows, weights, stride, tile, pitch), generate


@operation
def put_totals(typing: Any, sums: Any, rows: Any, out: Any, pitch: Any) -> Any:
    """out[r · pitch + i] += the sum of all lanes of sums[r, i], added up in the order of `total`; `out` is an address.
    At most LANES sums."""
    height = rows.literal_value
    width = len(sums) // height

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        sums, _, out, pitch = given
        vectors = [builder.extract_value(sums, at) for at in range(height * width)]
        vectors += [ir.Constant(WIDE_TYPE, None)] * (LANES - len(vectors))
        vectors = [vectors[i % 4 * 4 + i // 4] for i in range(LANES)]  # how the rounds below interleave them
        for half in (8, 4, 2, 1):
            low = _folded(half)
            order = [ir.Constant(ir.VectorType(INT, LANES), [at + part for at in low]) for part in (0, half)]
            vectors = [
                builder.fadd(*(builder.shuffle_vector(a, b, places) for places in order))
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        few = ir.VectorType(FLOAT, width)
        for r in range(height):
            own = ir.Constant(ir.VectorType(INT, width), [r * width + i for i in range(width)])
            place = pointer_to(builder, out, builder.mul(pitch, LONG(r)), FLOAT, few)
            new = builder.shuffle_vector(vectors[0], vectors[0], own)
            builder.store(builder.fadd(builder.load(place, align=4), new), place, align=4)
        return context.get_dummy_value()

    return types.void(sums, rows, out, pitch), generate


def _folded(half: int) -> list[int]:
    """Lanes of two vectors, those of the second from LANES on, to which the lanes `half` behind them are added: such
    that the sums of both are in one vector, side by side in each quarter of it where a quarter holds them."""
    if half >= 4:
        return [lane for lane in range(2 * LANES) if lane % (2 * half) < half]
    return [
        vector * LANES + quarter * 4 + pair * 2 * half + lane
        for quarter in range(4)
        for vector in range(2)
        for pair in range(2 // half)
        for lane in range(half)
    ]
