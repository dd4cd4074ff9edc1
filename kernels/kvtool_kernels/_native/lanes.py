"""Vectors by lane, beside `simd.py`: small tables, pairs of neighbours; and integers of 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, codegen, config, types
from numba.core.extending import intrinsic

from kvtool_kernels._native.simd import LANES, WIDE, WIDE_TYPE

FLOAT, BYTE, SHORT, INT, LONG = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF = LANES // 2
PLACES = ir.VectorType(INT, LANES)
_operation: Callable[[Callable[..., Any]], Any] = intrinsic(prefer_literal=True)


def _has(feature: str) -> bool:
    """Of the processor that code is compiled for."""
    told = getattr(config, "CPU_FEATURES", None)
    told = codegen.get_host_cpu_features() if told is None else told
    return f"+{feature}" in told.split(",")


def _order(places: list[int]) -> ir.Value:
    return ir.Constant(ir.VectorType(INT, len(places)), places)


@_operation
def short(typing: Any, address: Any, index: Any) -> Any:
    """The int16 at `index`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        place = builder.add(given[0], builder.mul(given[1], LONG(2)))
        return builder.sext(builder.load(builder.inttoptr(place, SHORT.as_pointer()), align=2), LONG)

    return types.int64(address, index), generate


def _below(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """Which lanes are before lane `count`."""
    none = ir.Constant(PLACES, ir.Undefined)
    one = builder.insert_element(none, builder.trunc(count, INT), INT(0))
    return builder.icmp_signed("<", _order(list(range(LANES))), builder.shuffle_vector(one, none, _order([0] * LANES)))


def _load_below(builder: ir.IRBuilder, kind: ir.VectorType, address: ir.Value, count: ir.Value) -> ir.Value:
    """The first `count` elements of a vector at an address, 0 behind them. No more is read."""
    inside, pointer = _below(builder, count), builder.inttoptr(address, kind.as_pointer())
    size, none = kind.element.width if kind != WIDE_TYPE else 32, ir.Constant(kind, None)
    made = ir.FunctionType(kind, [pointer.type, INT, inside.type, kind])
    name = f"llvm.masked.load.v{LANES}{'f' if kind == WIDE_TYPE else 'i'}{size}.p0"
    return builder.call(
        cgutils.get_or_insert_function(builder.module, made, name), [pointer, INT(size // 8), inside, none]
    )  # fmt: skip


@_operation
def first_of(typing: Any, address: Any, count: Any) -> Any:
    """A vector of the first `count` numbers at an address, at most LANES; 0 in the other lanes. No more is read."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        return _load_below(builder, WIDE_TYPE, given[0], given[1])

    return WIDE(address, count), generate


@_operation
def look_among(typing: Any, table: Any, indices: Any) -> Any:
    """table[index] by lane, of a table that is a vector; the indices are whole numbers in fp32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        numbers, places = given[0], builder.fptosi(given[1], PLACES)
        if _has("avx512f"):
            kind = ir.FunctionType(WIDE_TYPE, [WIDE_TYPE, PLACES])
            permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
            return builder.call(permute, [numbers, places])
        if _has("avx2"):
            return _by_halves(builder, numbers, places)
        found = ir.Constant(WIDE_TYPE, ir.Undefined)
        for lane in range(LANES):
            place = builder.extract_element(places, INT(lane))
            found = builder.insert_element(found, builder.extract_element(numbers, place), INT(lane))
        return found

    return WIDE(table, indices), generate


def _by_halves(builder: ir.IRBuilder, numbers: ir.Value, places: ir.Value) -> ir.Value:
    """As `look_among`, where a processor looks among 8 numbers by the low bits of a place."""
    half, few = ir.VectorType(FLOAT, HALF), ir.VectorType(INT, HALF)
    permute = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(half, [half, few]), "llvm.x86.avx2.permps"
    )  # fmt: skip
    low, high = list(range(HALF)), list(range(HALF, LANES))
    tables = [builder.shuffle_vector(numbers, numbers, _order(part)) for part in (low, high)]
    made = []
    for part in (low, high):
        own = builder.shuffle_vector(places, places, _order(part))
        near, far = (builder.call(permute, [table, own]) for table in tables)
        made.append(builder.select(builder.icmp_signed("<", own, ir.Constant(few, [HALF] * HALF)), near, far))
    return builder.shuffle_vector(*made, _order(low + high))


@_operation
def alternate(typing: Any, first: Any, second: Any, odd: Any) -> Any:
    """Every other number of two vectors side by side, from number `odd`, 0 or 1, on."""
    start = odd.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        return builder.shuffle_vector(given[0], given[1], _order(list(range(start, 2 * LANES, 2))))

    return WIDE(first, second, odd), generate


@_operation
def codes_below(typing: Any, power: Any, address: Any, count: Any, part: Any) -> Any:
    """Part `part` of the first `count` bytes at an address, a vector of `power`-bit codes as fp32; 0 behind them."""
    bits = power.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        wide = builder.zext(_load_below(builder, ir.VectorType(BYTE, LANES), given[1], given[2]), PLACES)
        none = ir.Constant(PLACES, ir.Undefined)
        place = builder.insert_element(none, builder.mul(builder.trunc(given[3], INT), INT(bits)), INT(0))
        places = builder.shuffle_vector(place, none, _order([0] * LANES))
        code = builder.and_(builder.lshr(wide, places), _order([(1 << bits) - 1] * LANES))
        return builder.sitofp(code, WIDE_TYPE)

    return WIDE(power, address, count, part), generate
