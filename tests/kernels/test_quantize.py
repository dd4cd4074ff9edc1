"""Coding: exact cases, error bounds, bytes per element, the distortion of a Gaussian; twins against the definition."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.packed import Layout, Packed
from kvtool_kernels.quantize import cpu, reference
from kvtool_kernels.quantize.spec import CASES, Case, Side, coded, inputs
from tests.kernels.twins import device, names
from tests.tolerance import close, same

LAYOUTS: tuple[Layout, ...] = ("token", "channel")


def function(name: str, which: str) -> object:
    return getattr(importlib.import_module(f"kvtool_kernels.quantize.{name}"), which, None)


def per_value(packed: Packed, numbers: torch.Tensor) -> torch.Tensor:
    """A scale or zero for each value [B,K,S,D]."""
    if packed.layout == "token":
        return numbers.float().repeat_interleave(packed.group, dim=2)
    return numbers.float().repeat_interleave(packed.group, dim=3)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", [name for name in names("quantize") if function(name, "dequantize")])
def test_decoding_twins(name: str, case: Case) -> None:
    packed = coded(inputs(case, device=device(name)), case.side)
    expected = reference.dequantize(packed)
    actual = function(name, "dequantize")(packed)
    assert actual.shape == expected.shape == (case.batch, case.kv_heads, case.entries, case.width)
    size = expected.abs().max().clamp_min(1.0) if expected.numel() else 1.0
    close(actual / size, expected / size)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = function(name, "dequantize")(packed, dtype)
        assert rounded.dtype == dtype
        if case.values != "beyond-fp16":
            close(rounded / size, expected / size)


@pytest.mark.parametrize("case", [case for case in CASES if case.side.code == "affine"], ids=str)
@pytest.mark.parametrize("name", [name for name in names("quantize") if function(name, "quantize")])
def test_coding_twins(name: str, case: Case) -> None:
    x = inputs(case, device=device(name))
    options = {"bits": case.side.bits, "group": case.side.group, "layout": case.side.layout}
    actual, expected = function(name, "quantize")(x, **options), reference.quantize(x, **options)
    identical(actual, expected)


def identical(actual: Packed, expected: Packed) -> None:
    for ours, theirs in zip(actual.tensors(), expected.tensors(), strict=True):
        assert ours.dtype == theirs.dtype
        same(ours, theirs)


LOOPS = [
    Case(Side(bits, layout, 16), batch=1, kv_heads=2, entries=2176, width=80) for layout in LAYOUTS for bits in (3, 4)
]
LOOPS += [Case(Side(5, "channel", 48), entries=65, width=96), Case(Side(2, "token", 8), entries=1032, width=16)]
LOOPS += [Case(Side(1, "channel", 16), entries=3, width=16), Case(Side(7, "token", 128), entries=256, width=48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOOPS, ids=str)
def test_compiled_coding_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    """Several pieces of a head; planes that end in half vectors; groups of several vectors; entries that lie apart."""
    side = {"bits": case.side.bits, "group": case.side.group, "layout": case.side.layout}
    x = inputs(case, dtype=dtype)
    for laid in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.transpose(2, 3).contiguous().transpose(2, 3)):
        identical(cpu.quantize(laid, **side), reference.quantize(x, **side))
    identical(cpu.quantize(x, **side, clip=0.7), reference.quantize(x, **side, clip=0.7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_coding_takes_the_even_code_at_a_midpoint(layout: Layout) -> None:
    x = torch.arange(32).repeat(32, 1) / 2  # 0 … 15.5, of which 15.5 is too much for 4 bits of scale 1
    x = (x.clamp_max(15) if layout == "channel" else x.clamp_max(15).T).reshape(1, 1, 32, 32).contiguous()
    packed = cpu.quantize(x, bits=4, group=32, layout=layout)
    assert bool((packed.scale == 1).all())
    identical(packed, reference.quantize(x, bits=4, group=32, layout=layout))
    expected = (torch.arange(32) / 2).clamp_max(15).round()
    same(reference.dequantize(packed)[0, 0].flatten() if layout == "channel" else
         reference.dequantize(packed)[0, 0].T.flatten(), expected.repeat(32))  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_compiled_coding_of_a_group_that_is_not_finite_spares_the_others(layout: Layout, value: float) -> None:
    """Its own codes are undefined; its range is the definition's, and so is everything of the other groups."""
    x = inputs(Case(batch=1, kv_heads=1, entries=32, width=32))
    x[0, 0, 5, 7] = value
    ours, theirs = (q.quantize(x, bits=4, group=16, layout=layout) for q in (cpu, reference))
    for a, b in ((ours.scale, theirs.scale), (ours.zero, theirs.zero)):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    other = torch.ones(32, 32, dtype=torch.bool)
    if layout == "token":
        other[:16, 7] = False
    else:
        other[5, :16] = False
    same(reference.dequantize(ours)[0, 0][other], reference.dequantize(theirs)[0, 0][other])


def test_what_is_differentiated_is_left_to_the_definition() -> None:
    x = inputs(Case()).requires_grad_()
    assert ops.quantize(x, bits=4, group=32, layout="token").scale.requires_grad


@pytest.mark.parametrize("name", [name for name in names("quantize") if function(name, "dequantize")])
@pytest.mark.parametrize(
    "side", [Side(4, "token", 32), Side(3, "channel", 16), Side(4, "channel", 32, "static")], ids=str
)
def test_memory_beyond_the_entries_is_not_read(name: str, side: Side) -> None:
    """Codes and scales are views into larger buffers whose tails hold 255 and NaN."""
    packed = coded(inputs(Case(side), device=device(name)), side)
    expected = reference.dequantize(packed)

    def within(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[2] == 1:
            return tensor
        poison = float("nan") if tensor.is_floating_point() else 255
        buffer = tensor.new_full(
            (tensor.shape[0], tensor.shape[1] + 1, 2 * tensor.shape[2], tensor.shape[3:].numel()), poison
        )
        view = buffer.view(*buffer.shape[:3], *tensor.shape[3:])[:, 1:, : tensor.shape[2]]
        return view.copy_(tensor)

    views = {field: within(getattr(packed, field)) for field in ("codes", "scale", "zero")}
    close(function(name, "dequantize")(dataclasses.replace(packed, **views)), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.side.code == "affine"], ids=str)
def test_the_error_is_at_most_half_a_step(case: Case) -> None:
    """Beyond the rounding of scale and zero, which fp16 keeps to 2^-11 and bf16 to 2^-8 of their size."""
    x = inputs(case)
    packed = ops.quantize(x, bits=case.side.bits, group=case.side.group, layout=case.side.layout)
    if not x.numel():
        return
    step, zero = per_value(packed, packed.scale), per_value(packed, packed.zero)
    slack = torch.finfo(packed.scale.dtype).eps * (zero.abs() + step * (2**case.side.bits - 1)) + 1e-7
    error = (ops.dequantize(packed) - x).abs()
    assert bool((error <= step / 2 + slack).all())
    assert bool(packed.scale.isfinite().all())
    assert packed.scale.dtype == (torch.bfloat16 if case.values == "beyond-fp16" else torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_evenly_spaced_values_are_exact_at_two_bits(layout: Layout) -> None:
    group = torch.tensor([-1.5, -0.75, 0.0, 0.75])
    x = group[torch.randint(4, (1, 2, 64, 64), generator=torch.Generator().manual_seed(0))]
    across = x if layout == "token" else x.transpose(2, 3)
    across[:, :, ::16], across[:, :, 1::16] = -1.5, 0.75  # every group holds both ends
    packed = ops.quantize(x, bits=2, group=16, layout=layout)
    same(ops.dequantize(packed), x)
    assert bool((packed.scale == 0.75).all())
    assert bool((packed.zero == -1.5).all())


@pytest.mark.parametrize("value", [0.0, 2.5, -60000.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_groups_are_exact(layout: Layout, value: float) -> None:
    packed = ops.quantize(torch.full((1, 1, 32, 32), value), bits=2, group=32, layout=layout)
    same(ops.dequantize(packed), torch.full((1, 1, 32, 32), value))
    assert not bool(packed.codes.any())
    assert bool((packed.scale == 1).all())


def test_scaling_a_channel_scales_its_scale_and_zero_and_leaves_its_codes() -> None:
    x = inputs(Case())
    factors = (2.0 ** (torch.arange(64) % 5 - 2)).half()  # powers of two are exact
    plain, scaled = (ops.quantize(y, bits=3, group=32, layout="token") for y in (x, x * factors))
    same(scaled.codes, plain.codes)
    same(scaled.scale, plain.scale * factors)
    same(scaled.zero, plain.zero * factors)


@pytest.mark.parametrize(("group", "expected"), [(32, 0.154), (128, 0.250)])
def test_the_distortion_of_a_gaussian_at_two_bits(group: int, expected: float) -> None:
    x = torch.randn(1, 4, 2048, 128, generator=torch.Generator().manual_seed(0))
    for layout in LAYOUTS:
        error = ops.dequantize(ops.quantize(x, bits=2, group=group, layout=layout)) - x
        assert float(error.square().mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_bits_are_closer(layout: Layout) -> None:
    x = inputs(Case())
    errors = [(ops.dequantize(ops.quantize(x, bits=bits, group=32, layout=layout)) - x).norm() for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


def test_clipping_narrows_the_range() -> None:
    x = inputs(Case(values="outliers"))
    plain, clipped = (ops.quantize(x, bits=2, group=64, layout="channel", clip=clip) for clip in (1.0, 0.5))
    close(clipped.scale.float(), plain.scale.float() / 2, torch.float16)
    inside = (x >= per_value(clipped, clipped.zero)) & (x <= per_value(plain, plain.zero + 3 * plain.scale) / 2)
    error = (ops.dequantize(clipped) - x).abs()[inside]
    assert float((error - per_value(clipped, clipped.scale)[inside] / 2).max()) < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_per_element(bits: int, layout: Layout) -> None:
    """bits / 8 for the codes and two fp16 numbers per group of 32."""
    packed = ops.quantize(inputs(Case(entries=96)), bits=bits, group=32, layout=layout)
    elements = 2 * 3 * 96 * 64
    assert packed.codes.nbytes * 8 == elements * bits
    assert packed.nbytes == elements * bits // 8 + elements // 32 * 4
    assert packed.tokens == 96


@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_take_the_nearest(layout: Layout) -> None:
    x = inputs(Case())
    packed = coded(x, Side(3, layout, 32, "levels"))
    offered = per_value(packed, packed.scale)[..., None] * packed.levels + per_value(packed, packed.zero)[..., None]
    best = (offered - x[..., None]).abs().min(-1).values
    close((ops.dequantize(packed) - x).abs(), best)


def test_levels_at_a_midpoint_take_the_lower() -> None:
    levels, one = torch.tensor([-1.0, 0.0, 1.0, 3.0]), torch.ones(1, 1, 1, 1)
    x = torch.tensor([-0.5, 0.5, 2.0, 2.1, -9.0, 9.0, 0.0, 1.0]).reshape(1, 1, 1, 8)
    packed = ops.quantize_levels(x, levels=levels, scale=one, zero=None, bits=2, group=8, layout="channel")
    same(ops.dequantize(packed).flatten(), torch.tensor([-1.0, 0.0, 1.0, 3.0, -1.0, 3.0, 0.0, 1.0]))


def test_a_static_range_serves_every_entry() -> None:
    x = inputs(Case(entries=63))
    packed = coded(x, Side(4, "channel", 1, "static"))
    assert packed.scale.shape == (1, 3, 1, 64)
    assert packed.nbytes == 2 * 3 * 63 * 32 + 2 * 3 * 64 * 2 + 16 * 4
    assert float((ops.dequantize(packed) - x).abs().max()) < 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_scale_of_two_bytes_is_read_exactly(dtype: torch.dtype) -> None:
    """Subnormal numbers, infinities and NaN among them: code 1 of each scale is the scale."""
    scale = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(1, 1, 4096, 16)
    codes = ops.pack(torch.ones(1, 1, 4096, 256, dtype=torch.uint8), 4)
    found = ops.dequantize(Packed(codes, scale, None, 4, 16, "channel", 256))
    expected = scale.float().repeat_interleave(16, dim=3)
    assert torch.equal(found.isnan(), expected.isnan())
    same(found.nan_to_num(), expected.nan_to_num())


def test_refusals() -> None:
    x = torch.zeros(1, 1, 63, 64)
    for layout, group, message in (
        ("token", 32, "63 entries"),
        ("token", 24, "63 entries"),
        ("channel", 48, "64 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantize(x, bits=4, group=group, layout=layout)
    with pytest.raises(ValueError, match="16 levels"):
        ops.quantize_levels(x, levels=torch.zeros(3), scale=x, zero=None, bits=4, group=64, layout="channel")
