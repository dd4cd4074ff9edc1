"""What only the Triton twins can get wrong: each way to apply a scale, splits of a segment, codes bit for bit.

Their agreement with the definitions is in each operation's own tests, run by the interpreter where there is no GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool_kernels.attend.spec import Case as Dense
from kvtool_kernels.attend.spec import inputs as dense_inputs
from kvtool_kernels.attend_packed.spec import Case, inputs
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize import reference as quantize_reference
from kvtool_kernels.quantize.spec import CASES, Side, coded
from kvtool_kernels.quantize.spec import Case as Coding
from kvtool_kernels.quantize.spec import inputs as values
from tests.kernels.test_attend import agree
from tests.kernels.twins import device, reference, twin
from tests.tolerance import same

pytest.importorskip("triton", reason="Triton has wheels on Linux only")

from kvtool_kernels import tiles
from kvtool_kernels.attend_packed import triton as packed_triton
from kvtool_kernels.quantize import triton as quantize_triton

# width 64, few query rows: the mode that each way of coding takes
MODES = {
    Side(3, "token", 128): packed_triton.TILE,
    Side(4, "channel", 1, "static"): packed_triton.TILE,
    Side(4, "channel", 64): packed_triton.ENTRY,
    Side(3, "channel", 64, "levels"): packed_triton.ENTRY,
    Side(2, "token", 8): packed_triton.ELEMENT,
    Side(5, "channel", 16, "symmetric"): packed_triton.ELEMENT,
    None: packed_triton.DENSE,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("keys", "values"), list(zip(MODES, [*list(MODES)[1:], None], strict=True)), ids=str)
def test_every_way_to_apply_scales(keys: Side | None, values: Side | None, dtype: torch.dtype) -> None:
    given = inputs(Case(keys, values, entries=256, heads=2, kv_heads=1), dtype=dtype, device=device("triton"))
    for name, side in (("keys", keys), ("values", values)):
        assert packed_triton.side(given[name], 1, 32).mode == MODES[side].value
    agree(twin("attend_packed", "triton")(**given), reference("attend_packed")(**given))


@pytest.mark.parametrize("side", [Side(4, "token", 32), Side(4, "channel", 64), Side(4, "channel", 16)], ids=str)
def test_slack_in_codes_and_scales_is_not_read(side: Side) -> None:
    """A segment's tensors are views into larger ones, whose scales beyond the entries are NaN."""
    given = inputs(Case(side, side, entries=96, batch=2, tokens=3), device=device("triton"))
    expected = reference("attend_packed")(**given)
    for name in ("keys", "values"):
        packed: Packed = given[name]
        held = {}
        for field in ("codes", "scale", "zero"):
            tensor = getattr(packed, field)
            filler = 255 if field == "codes" else float("nan")
            buffer = tensor.new_full((*tensor.shape[:2], 2 * tensor.shape[2], *tensor.shape[3:]), filler)
            buffer[:, :, : tensor.shape[2]] = tensor
            held[field] = buffer[:, :, : tensor.shape[2]]
        given[name] = dataclasses.replace(packed, **held)
    agree(twin("attend_packed", "triton")(**given), expected)


@pytest.mark.parametrize("programs", [1, 8, 64])
def test_any_number_of_splits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one split to as many as there are blocks; causal ones end early, or see nothing."""
    monkeypatch.setattr(tiles, "PROGRAMS", programs)
    monkeypatch.setattr(tiles, "SPLIT", 16)
    monkeypatch.setattr(tiles, "INTERPRETED_TILE", (16, 16))
    for case in (Dense(entries=300), Dense(batch=2, tokens=3, entries=200, causal=True, hide="padding")):
        given = dense_inputs(case, device=device("triton"))
        agree(twin("attend", "triton")(**given), reference("attend")(**given))


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.values in ("normal", "constant", "tiny", "huge") and not case.side.outliers],
    ids=str,
)
def test_codes_bit_for_bit(case: Coding) -> None:
    dtype = torch.float16 if case.side.bits % 2 else torch.float32
    x, side = values(case, dtype=dtype, device=device("triton")), case.side
    layout = {"bits": side.bits, "group": side.group, "layout": side.layout}
    expected = coded(x, side)
    if side.code == "affine":
        actual = quantize_triton.quantize(x, **layout)
    else:
        code = {name: getattr(expected, name) for name in ("levels", "scale", "zero")}
        actual = quantize_triton.quantize_levels(x, **code, **layout)
    for ours, theirs in zip(actual.tensors(), expected.tensors(), strict=True):
        same(ours, theirs)
    same(quantize_triton.dequantize(expected, dtype), quantize_reference.dequantize(expected, dtype))


def test_clipping_bit_for_bit() -> None:
    x = values(Coding(), device=device("triton"))
    options = {"bits": 2, "group": 32, "layout": "channel", "clip": 0.85}
    ours, theirs = quantize_triton.quantize(x, **options), quantize_reference.quantize(x, **options)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        same(a, b)


def test_entries_of_a_transposed_tensor() -> None:
    """Channels that are not neighbours in memory, and heads behind entries, as a model's projections leave them."""
    x = values(Coding(), device=device("triton"))
    for moved in (x.transpose(2, 3).contiguous().transpose(2, 3), x.transpose(1, 2).contiguous().transpose(1, 2)):
        ours, theirs = (
            q.quantize(moved, bits=3, group=32, layout="token") for q in (quantize_triton, quantize_reference)
        )
        for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
            same(a, b)
