"""Attention over latents: twins against the definition, which is attention over the keys that the latents stand for."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels._native.record import FEW
from kvtool_kernels.latent import cpu
from kvtool_kernels.latent.reference import attend_latent as define
from kvtool_kernels.latent.reference import rotate
from kvtool_kernels.latent.spec import CASES, Case, inputs
from kvtool_kernels.quantize.spec import Side
from tests.kernels.test_attend import agree
from tests.kernels.test_attend_packed import poisoned
from tests.kernels.twins import device, names
from tests.tolerance import close

TWINS = names("latent")


def twin(name: str) -> object:
    return importlib.import_module(f"kvtool_kernels.latent.{name}").attend_latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_twins(name: str, case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype=dtype, device=device(name))
    agree(twin(name)(**given), define(**given))


@pytest.mark.parametrize("case", [case for case in CASES if case.entries], ids=str)
def test_both_ways_of_the_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops are taken where they can be; what they do not cover goes block by block, and so can all."""
    given = inputs(case)
    expected, taken = define(**given), []
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_logits", lambda *rest: taken.append(rest))
        patch.setattr(cpu, "_weighed", lambda *rest: expected)
        agree(cpu.attend_latent(**given), expected)
    rows, whole = case.heads // case.kv_heads * case.tokens, case.width % 16 == 0 and not case.offset
    assert bool(taken) == (rows > FEW or (case.rank is None and not whole))
    monkeypatch.setattr(cpu, "served", lambda *rest: False)
    agree(cpu.attend_latent(**given), expected)


@pytest.mark.parametrize("keys", [None, Side(4, "channel", 64, "levels", 2), Side(3, "token", 32)], ids=str)
def test_threads_do_not_change_the_result(keys: Side | None) -> None:
    """Pieces of a head are merged, whoever finishes last."""
    given = inputs(Case(heads=6, kv_heads=2, entries=4096, rank=64, shared=2, keys=keys))
    expected, before = define(**given), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(5):
            agree(cpu.attend_latent(**given), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_full_rank_without_rotation_is_attention(name: str) -> None:
    """With the identity for a basis, latents are the keys."""
    given = inputs(Case(tokens=3, rank=64, rotary=0, value_width=64), device=device(name))
    given["basis"] = torch.eye(64, device=given["q"].device).expand(2, 64, 64)
    agree(twin(name)(**given), ops.attend(given["q"], given["z"], given["v"], scale=given["scale"]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_only_distances_matter(name: str, interleaved: bool) -> None:
    """Entries and query moved by the same number of positions leave the result."""
    given = inputs(Case(entries=63, rotary=40, interleaved=interleaved), device=device(name))
    outputs = []
    for shift in (0, 17):
        cos, sin = given["cos"][50 + shift], given["sin"][50 + shift]
        q = rotate(given["q"], cos, sin, interleaved)
        moved = {**given, "q": q, "positions": given["positions"].clamp_max(100) + shift}
        outputs.append(twin(name)(**moved))
    agree(*outputs)


def test_rotation_turns_by_the_angle_of_the_position() -> None:
    """Against complex numbers, in both orders of the pairs."""
    x, angle = torch.randn(5, 8), torch.randn(5, 3)
    for interleaved in (False, True):
        first = [0, 2, 4] if interleaved else [0, 1, 2]
        second = [1, 3, 5] if interleaved else [3, 4, 5]
        turned = torch.complex(x[:, first], x[:, second]) * torch.polar(torch.ones_like(angle), angle)
        actual = rotate(x, angle.cos(), angle.sin(), interleaved)
        close(torch.complex(actual[:, first], actual[:, second]).abs(), turned.abs())
        close(actual[:, first], turned.real)
        close(actual[:, second], turned.imag)
        close(actual[:, 6:], x[:, 6:])


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_latent_values_take_their_basis_afterwards(name: str) -> None:
    given = inputs(Case(tokens=2, entries=100, value_width=24), device=device(name))
    basis = torch.randn(2, 24, 64, device=given["q"].device)
    out, lse = twin(name)(**given)
    late = torch.einsum("bkgtr,krd->bkgtd", out.unflatten(1, (2, 2)), basis).flatten(1, 2)
    agree((late, lse), define(**{**given, "v": given["v"] @ basis}))


@pytest.mark.parametrize("keys", [None, Side(3, "channel", 32, "levels", 2)], ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_memory_beyond_the_entries_is_not_read(name: str, keys: Side | None) -> None:
    given = inputs(Case(batch=2, entries=63, keys=keys, values=keys, value_width=32), device=device(name))
    expected = define(**given)
    given |= {key: poisoned(given[key]) for key in ("z", "v")}
    positions = given["positions"].new_full((2, 2, 100), 2**30)
    positions[..., :63] = given["positions"]
    agree(twin(name)(**{**given, "positions": positions[..., :63]}), expected)


@pytest.mark.parametrize("name", TWINS)
def test_one_position_per_entry_for_all_heads(name: str) -> None:
    given = inputs(dataclasses.replace(CASES[3], batch=2, entries=100), device=device(name))
    given["positions"] = given["positions"][:1, :1]
    agree(twin(name)(**given), define(**given))
