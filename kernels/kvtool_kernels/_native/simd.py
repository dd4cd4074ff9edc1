"""Vectors of fp32 for Numba: loads, code extraction, products with rows of weights, exp, transposition.

Plain loops over byte codes are not vectorised well (their arithmetic is 64-bit and any two arrays may alias), so
that these are written as LLVM vectors, which LLVM splits where a processor's registers are narrower. Memory is an
address and an index in elements, both int64; nothing is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.extending import intrinsic, register_model

LANES = 16
FP32, FP16, BF16 = 0, 1, 2
FLOAT = ir.FloatType()
_BYTE, _SHORT, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SIZES = {_BYTE: 1, _SHORT: 2, FLOAT: 4, LONG: 8}
Builder: TypeAlias = ir.IRBuilder
operation: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)


class Vector(types.Type):
    """`lanes` fp32 numbers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(FLOAT, kind.lanes))


WIDE = Vector(LANES)
WIDE_TYPE = ir.VectorType(FLOAT, LANES)


def _constant(value: float, like: ir.Type) -> ir.Value:
    return ir.Constant(like, [value] * like.count)


def everywhere(builder: Builder, value: ir.Value, lanes: int) -> ir.Value:
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def pointer_to(builder: Builder, address: ir.Value, index: ir.Value, element: ir.Type, kind: ir.Type) -> ir.Value:
    """Pointer to a `kind` that starts at element `index`."""
    return builder.inttoptr(builder.add(address, builder.mul(index, LONG(_SIZES[element]))), kind.as_pointer())


def _call(builder: Builder, name: str, result: ir.Type, *values: ir.Value, flags: tuple[str, ...] = ()) -> ir.Value:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values, fastmath=flags)


def multiply_add(builder: Builder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def _half(builder: Builder, bits: ir.Value, wide: ir.Type, result: ir.Type) -> ir.Value:
    """The bits of fp16 as fp32, without the conversion that not every processor has: move the exponent, rescale it."""
    magnitude = builder.shl(builder.and_(bits, _constant(0x7FFF, wide)), _constant(13, wide))
    scaled = builder.fmul(builder.bitcast(magnitude, result), _constant(2.0**112, result))
    special = builder.icmp_unsigned(">=", magnitude, _constant(0x7C00 << 13, wide))  # infinities and NaN
    exponent = builder.select(special, _constant(0x7F800000, wide), _constant(0, wide))
    sign = builder.shl(builder.and_(bits, _constant(0x8000, wide)), _constant(16, wide))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(scaled, wide), exponent), sign), result)


@operation
def load(typing: Any, kind: Any, lanes: Any, address: Any, index: Any) -> Any:
    """`lanes` numbers from `index` on, as fp32; `kind` is FP32, FP16 or BF16."""
    vector, dtype = Vector(lanes.literal_value), kind.literal_value

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        result, wide = ir.VectorType(FLOAT, vector.lanes), ir.VectorType(INT, vector.lanes)
        if dtype == FP32:
            return builder.load(pointer_to(builder, given[2], given[3], FLOAT, result), align=4)
        short = pointer_to(builder, given[2], given[3], _SHORT, ir.VectorType(_SHORT, vector.lanes))
        bits = builder.zext(builder.load(short, align=2), wide)
        if dtype == BF16:
            return builder.bitcast(builder.shl(bits, _constant(16, wide)), result)
        return _half(builder, bits, wide, result)

    return vector(kind, lanes, address, index), generate


@operation
def codes(typing: Any, span: Any, power: Any, address: Any, index: Any, part: Any) -> Any:
    """A vector of `power`-bit codes as fp32: lane l is part `part` + l // span of byte `index` + l % span."""
    reach, bits = span.literal_value, power.literal_value

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        _, _, address, index, part = given
        wide, few = ir.VectorType(INT, LANES), ir.VectorType(_BYTE, reach)
        read = builder.load(pointer_to(builder, address, index, _BYTE, few), align=1)
        if reach < LANES:
            read = builder.shuffle_vector(read, read, ir.Constant(wide, [lane % reach for lane in range(LANES)]))
        first = everywhere(builder, builder.mul(builder.trunc(part, INT), INT(bits)), LANES)
        places = builder.add(first, ir.Constant(wide, [lane // reach * bits for lane in range(LANES)]))
        code = builder.and_(builder.lshr(builder.zext(read, wide), places), _constant((1 << bits) - 1, wide))
        return builder.sitofp(code, WIDE_TYPE)

    return WIDE(span, power, address, index, part), generate


@operation
def splat(typing: Any, lanes: Any, value: Any) -> Any:
    """One number in every lane."""
    kind = Vector(lanes.literal_value)

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return everywhere(builder, given[1], kind.lanes)

    return kind(lanes, types.float32), generate


@operation
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return multiply_add(builder, *given)

    return a(a, b, c), generate


@operation
def larger(typing: Any, a: Any, b: Any) -> Any:
    """max(a, b) by lane."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return _call(builder, f"llvm.maxnum.v{a.lanes}f32", given[0].type, *given)

    return a(a, b), generate


@operation
def minimum(typing: Any, a: Any, b: Any) -> Any:
    """min(a, b) by lane; NaN if one of them is."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return _call(builder, f"llvm.minimum.v{a.lanes}f32", given[0].type, *given, flags=("nsz",))

    return a(a, b), generate


@operation
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """max(a, b) by lane; NaN if one of them is."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return _call(builder, f"llvm.maximum.v{a.lanes}f32", given[0].type, *given, flags=("nsz",))

    return a(a, b), generate


@operation
def divide(typing: Any, a: Any, b: Any) -> Any:
    """a / b by lane."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return builder.fdiv(*given)

    return a(a, b), generate


@operation
def store(typing: Any, address: Any, index: Any, vector: Any) -> Any:
    """Write a vector at `index`."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        builder.store(given[2], pointer_to(builder, given[0], given[1], FLOAT, given[2].type), align=4)
        return context.get_dummy_value()

    return types.void(address, index, vector), generate


@operation
def read(typing: Any, address: Any, index: Any) -> Any:
    """The fp32 number at `index`."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return builder.load(pointer_to(builder, given[0], given[1], FLOAT, FLOAT))

    return types.float32(address, index), generate


@operation
def write(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Write one fp32 number at `index`."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        builder.store(given[2], pointer_to(builder, given[0], given[1], FLOAT, FLOAT))
        return context.get_dummy_value()

    return types.void(address, index, types.float32), generate


@operation
def field(typing: Any, address: Any, index: Any) -> Any:
    """The int64 at `index`."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return builder.load(pointer_to(builder, given[0], given[1], LONG, LONG))

    return types.int64(address, index), generate


@operation
def invoke(typing: Any, function: Any, whole: Any, fraction: Any) -> Any:
    """Call the function at an address with a tuple of int64 and one fp32; it returns nothing."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [LONG] * whole.count + [FLOAT])
        numbers = [builder.extract_value(given[1], index) for index in range(whole.count)]
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), [*numbers, given[2]])
        return context.get_dummy_value()

    return types.void(function, whole, fraction), generate


@operation
def take(typing: Any, address: Any) -> Any:
    """The int64 at an address, which grows by one: atomic, so that threads share out work with it."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        pointer = builder.inttoptr(given[0], LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, LONG(1), "seq_cst")

    return types.int64(address), generate


@operation
def address_of(typing: Any, pointer: Any) -> Any:
    """A pointer as an address."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return builder.ptrtoint(given[0], LONG)

    return types.int64(pointer), generate


@operation
def total(typing: Any, vector: Any) -> Any:
    """The sum of all lanes."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        name = f"llvm.vector.reduce.fadd.v{vector.lanes}f32"
        return _call(builder, name, FLOAT, FLOAT(-0.0), given[0], flags=("reassoc",))

    return types.float32(vector), generate


@operation
def largest(typing: Any, vector: Any) -> Any:
    """The largest lane."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return _call(builder, f"llvm.vector.reduce.fmax.v{vector.lanes}f32", FLOAT, given[0])

    return types.float32(vector), generate


@operation
def lowest(typing: Any, vector: Any) -> Any:
    """The smallest lane; NaN if one is."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return _call(builder, f"llvm.vector.reduce.fminimum.v{vector.lanes}f32", FLOAT, given[0], flags=("nsz",))

    return types.float32(vector), generate


@operation
def highest(typing: Any, vector: Any) -> Any:
    """The largest lane; NaN if one is."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        return _call(builder, f"llvm.vector.reduce.fmaximum.v{vector.lanes}f32", FLOAT, given[0], flags=("nsz",))

    return types.float32(vector), generate


@operation
def code_of(typing: Any, x: Any, zero: Any, scale: Any, top: Any) -> Any:
    """round(clamp((x − zero) / scale, 0, top)) in the low bits of each lane: adding 1.5 · 2^23 leaves it there."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        x, zero, scale, top = given
        kind, lanes = x.type, x.type.count
        ratio = builder.fdiv(builder.fsub(x, zero), scale)
        above = _call(builder, f"llvm.maxnum.v{lanes}f32", kind, ratio, _constant(0.0, kind))
        inside = _call(builder, f"llvm.minnum.v{lanes}f32", kind, above, top)
        return builder.fadd(inside, _constant(12582912.0, kind))

    return x(x, zero, scale, top), generate


@operation
def deposit(typing: Any, bits: Any, source: Any, taken: Any, mask: Any, place: Any) -> Any:
    """bits | (source >> taken & mask) << place, on the bits of each lane."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        kind = given[0].type
        wide = ir.VectorType(INT, kind.count)
        taken, mask, place = (everywhere(builder, builder.trunc(number, INT), kind.count) for number in given[2:])
        part = builder.and_(builder.lshr(builder.bitcast(given[1], wide), taken), mask)
        return builder.bitcast(builder.or_(builder.bitcast(given[0], wide), builder.shl(part, place)), kind)

    return bits(bits, source, taken, mask, place), generate


@operation
def store_bytes(typing: Any, address: Any, index: Any, bits: Any) -> Any:
    """The low byte of each lane, one after the other from byte `index` on."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        lanes = given[2].type.count
        narrow = builder.trunc(builder.bitcast(given[2], ir.VectorType(INT, lanes)), ir.VectorType(_BYTE, lanes))
        builder.store(narrow, pointer_to(builder, given[0], given[1], _BYTE, narrow.type), align=1)
        return context.get_dummy_value()

    return types.void(address, index, bits), generate


@operation
def copy_byte(typing: Any, source: Any, start: Any, target: Any, end: Any) -> Any:
    """Byte `start` of an address to byte `end` of another."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        byte = builder.load(pointer_to(builder, given[0], given[1], _BYTE, _BYTE))
        builder.store(byte, pointer_to(builder, given[2], given[3], _BYTE, _BYTE))
        return context.get_dummy_value()

    return types.void(source, start, target, end), generate


@operation
def exp(typing: Any, vector: Any) -> Any:
    """e^x to about one unit in the last place; 0 below −87, e^88 above 88, NaN of NaN.

    x = n ln 2 + r, e^r by the polynomial of Cephes, 2^n through the exponent bits. Adding 1.5 · 2^23 rounds to n and
    leaves it in the low bits.
    """

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        kind, wide = given[0].type, ir.VectorType(INT, vector.lanes)

        def real(value: float) -> ir.Value:
            return _constant(value, kind)

        low = builder.fcmp_ordered("<", given[0], real(-87.0))
        x = builder.select(low, real(-87.0), given[0])
        x = builder.select(builder.fcmp_ordered(">", x, real(88.0)), real(88.0), x)
        shifted = multiply_add(builder, x, real(math.log2(math.e)), real(12582912.0))
        n = builder.fsub(shifted, real(12582912.0))
        r = multiply_add(builder, n, real(2.12194440e-4), multiply_add(builder, n, real(-0.693359375), x))
        p = real(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
            p = multiply_add(builder, p, r, real(c))
        exponent = builder.add(builder.bitcast(shifted, wide), _constant(127, wide))
        power = builder.bitcast(builder.shl(exponent, _constant(23, wide)), kind)
        return builder.select(low, real(0.0), builder.fmul(p, power))

    return vector(vector), generate


@operation
def look_up(typing: Any, table: Any, indices: Any) -> Any:
    """table[index] by lane; the indices are whole numbers in fp32."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> ir.Value:
        places = builder.fptosi(given[1], ir.VectorType(INT, indices.lanes))
        found = ir.Constant(given[1].type, ir.Undefined)
        for lane in range(indices.lanes):
            place = builder.sext(builder.extract_element(places, INT(lane)), LONG)
            value = builder.load(pointer_to(builder, given[0], place, FLOAT, FLOAT))
            found = builder.insert_element(found, value, INT(lane))
        return found

    return indices(table, indices), generate


@operation
def transpose(typing: Any, source: Any, stride: Any, target: Any, pitch: Any) -> Any:
    """target[j · pitch + i] = source[i · stride + j] for i, j < LANES; both are addresses."""

    def generate(context: Any, builder: Builder, signature: Any, given: Any) -> Any:
        source, stride, target, pitch = given
        kind, order = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
        rows = [
            builder.load(pointer_to(builder, source, builder.mul(stride, LONG(i)), FLOAT, kind), align=4)
            for i in range(LANES)
        ]
        half = LANES // 2
        low = [i // 2 + LANES * (i % 2) for i in range(LANES)]  # one round of interleaving row i with row i + half
        while half > 0:
            pairs = [(rows[i], rows[i + LANES // 2]) for i in range(LANES // 2)]
            rows = [
                builder.shuffle_vector(a, b, ir.Constant(order, [place + offset for place in low]))
                for a, b in pairs
                for offset in (0, LANES // 2)
            ]
            half //= 2
        for j, row in enumerate(rows):
            builder.store(row, pointer_to(builder, target, builder.mul(pitch, LONG(j)), FLOAT, kind), align=4)
        return context.get_dummy_value()

    return types.void(source, stride, target, pitch), generate
