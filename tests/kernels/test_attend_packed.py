"""Attention over coded entries: twins against the definition, which is attention over the decoded entries."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels._native import team
from kvtool_kernels.attend import spec as attend_spec
from kvtool_kernels.attend_packed.spec import CASES, Case, inputs, kivi
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize.spec import Side
from tests.kernels.test_attend import agree
from tests.kernels.twins import device, names, reference, twin
from tests.tolerance import close

define, dense_reference = reference("attend_packed"), reference("attend")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", names("attend_packed"))
def test_twins(name: str, case: Case) -> None:
    given = inputs(case, device=device(name))
    agree(twin("attend_packed", name)(**given), define(**given))


@pytest.mark.parametrize("case", [kivi(4), kivi(2, tokens=5), kivi(4, tokens=17), Case(None, kivi(4).values)], ids=str)
@pytest.mark.parametrize("name", names("attend_packed"))
def test_half_precision(name: str, case: Case) -> None:
    given = inputs(case, dtype=torch.bfloat16, device=device(name))
    agree(twin("attend_packed", name)(**given), define(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", names("attend_packed"))
def test_scales_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    given = inputs(kivi(4, batch=2), device=device(name))
    for side in ("keys", "values"):
        packed = given[side]
        given[side] = dataclasses.replace(packed, scale=packed.scale.to(dtype), zero=packed.zero.to(dtype))
    agree(twin("attend_packed", name)(**given), define(**given))


def test_the_definition_is_attention_over_the_decoded_entries() -> None:
    given = inputs(kivi(3, tokens=5))
    k, v = ops.dequantize(given["keys"]), ops.dequantize(given["values"])
    agree(define(**given), ops.attend(given["q"], k, v, scale=given["scale"]))


@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize("name", names("attend_packed"))
@pytest.mark.parametrize(
    "sides",
    [
        kivi(4),
        Case(Side(2, "channel", 16), Side(3, "token", 32)),
        Case(None, None),
        Case(Side(4, "channel", 64, "levels", 2), Side(3, "channel", 8, outliers=1)),
        Case(Side(3, "channel", 24), Side(5, "channel", 24, "levels"), width=24),
    ],
    ids=str,
)
def test_memory_beyond_the_entries_is_not_read(name: str, sides: Case, tokens: int) -> None:
    """Every tensor is a view into a larger buffer whose tail holds 255 or NaN."""
    given = inputs(dataclasses.replace(sides, batch=2, tokens=tokens, entries=96), device=device(name))
    expected = define(**given)
    for side in ("keys", "values"):
        given[side] = poisoned(given[side])
    agree(twin("attend_packed", name)(**given), expected)


def poisoned(side: Any) -> Any:
    if isinstance(side, Packed):
        held = {name: getattr(side, name) for name in ("codes", "scale", "zero")}
        parts = {name: poisoned(tensor) for name, tensor in held.items() if tensor is not None}
        apart = None if side.outliers is None else tuple(poisoned(x) for x in side.outliers)
        return dataclasses.replace(side, **parts, outliers=apart)
    buffer = side.new_full((side.shape[0], side.shape[1], side.shape[2] + 7, *side.shape[3:]), 255)
    if side.is_floating_point():
        buffer.fill_(float("nan"))
    return buffer[:, :, : side.shape[2]].copy_(side)


@pytest.mark.parametrize("which", ["codes", "scale", "zero"])
@pytest.mark.parametrize("name", names("attend_packed"))
def test_neighbours_may_lie_apart_in_memory(name: str, which: str) -> None:
    given = inputs(kivi(4, batch=2), device=device(name))
    expected = define(**given)
    for side in ("keys", "values"):
        tensor = getattr(given[side], which)
        apart = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        given[side] = dataclasses.replace(given[side], **{which: apart})
    agree(twin("attend_packed", name)(**given), expected)


@pytest.mark.parametrize("name", names("attend_packed"))
def test_nothing_is_attended_to(name: str) -> None:
    given = inputs(kivi(4, entries=0, tokens=3), device=device(name))
    out, lse = twin("attend_packed", name)(**given)
    assert out.shape == given["q"].shape
    assert not bool(out.any())
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("name", names("attend_packed"))
def test_a_query_of_nan_gives_nan_and_spares_the_others(name: str) -> None:
    given = inputs(kivi(4, batch=2), device=device(name))
    expected = define(**given)
    given["q"][0, 2] = float("nan")
    out, lse = twin("attend_packed", name)(**given)
    assert bool(out[0, 2].isnan().all())
    assert bool(lse[0, 2].isnan().all())
    agree((out[1], lse[1]), (expected[0][1], expected[1][1]))


def test_parts_merge_to_the_whole() -> None:
    """A coded past and a dense tail, as a cache holds them."""
    given = inputs(kivi(4, entries=96))
    tail = {name: torch.randn(1, 2, 63, 64, generator=torch.Generator().manual_seed(1)) for name in "kv"}
    coded = ops.attend_packed(**given)
    merged = ops.merge(coded, ops.attend(given["q"], **tail, scale=given["scale"]))
    k, v = (torch.cat([ops.dequantize(given[side]), tail[name]], 2) for side, name in (("keys", "k"), ("values", "v")))
    agree(merged, ops.attend(given["q"], k, v, scale=given["scale"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        attend_spec.Case(entries=2049),
        attend_spec.Case(entries=3000, batch=2, heads=7, kv_heads=1, width=40),
        attend_spec.Case(entries=2500, tokens=5, causal=True),
        attend_spec.Case(entries=2500, softcap=3.0, size=5.0, value_width=32),
    ],
    ids=str,
)
def test_dense_attention_over_many_entries_takes_the_same_loops(case: attend_spec.Case, dtype: torch.dtype) -> None:
    given = attend_spec.inputs(case, dtype=dtype)
    expected = dense_reference(**given)
    for name in "kv":
        given[name] = poisoned(given[name])
    agree(ops.attend(**given), expected)


def test_gradients_reach_the_queries() -> None:
    """The compiled loops know no derivative: with one asked for, the entries are decoded for PyTorch's kernel."""
    given = inputs(kivi(4))
    given["q"].requires_grad_()
    ops.attend_packed(**given)[0].square().sum().backward()
    actual, given["q"].grad = given["q"].grad, None
    define(**given)[0].square().sum().backward()
    close(actual, given["q"].grad)


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_do_not_change_the_result(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of PyTorch, and those that stand in for them where it has no GNU OpenMP."""
    given = inputs(kivi(4, entries=4096, batch=2))
    expected = ops.attend_packed(**given)
    if not openmp:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(5):
            agree(ops.attend_packed(**given), expected)
    finally:
        torch.set_num_threads(before)
