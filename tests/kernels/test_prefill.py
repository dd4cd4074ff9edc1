"""Sinks and a sliding window: twins against the definition, chunks against the whole, known windows."""

from __future__ import annotations

import importlib

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.prefill.reference import streaming_prefill as define
from kvtool_kernels.prefill.spec import CASES, Case, inputs
from tests.kernels.test_attend import agree
from tests.kernels.twins import device, names
from tests.tolerance import close

TWINS = names("prefill")


def twin(name: str) -> object:
    return importlib.import_module(f"kvtool_kernels.prefill.{name}").streaming_prefill


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_twins(name: str, case: Case) -> None:
    given = inputs(case, device=device(name))
    agree(twin(name)(**given), define(**given))


@pytest.mark.parametrize("case", [Case(), Case(tokens=100, start=100, recent=130, sink=10)], ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_half_precision(name: str, case: Case) -> None:
    given = inputs(case, dtype=torch.bfloat16, device=device(name))
    agree(twin(name)(**given), define(**given))


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_a_window_of_everything_is_causal_attention(name: str) -> None:
    given = inputs(Case(sink=0, recent=63), device=device(name))
    agree(twin(name)(**given), ops.attend(*(given[x] for x in "qkv"), scale=given["scale"], causal=True))


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_each_query_alone(name: str) -> None:
    """A row is attention over the sinks and the window, picked by hand."""
    given = inputs(Case(tokens=40, sink=3, recent=5), device=device(name))
    out, lse = twin(name)(**given)
    for place in (0, 2, 3, 7, 8, 39):
        seen = sorted({*range(min(3, place + 1)), *range(max(0, place - 4), place + 1)})
        k, v = (given[x][:, :, seen] for x in "kv")
        one, level = ops.attend(given["q"][:, :, place : place + 1], k, v, scale=given["scale"])
        close(out[:, :, place : place + 1], one)
        close(lse[:, :, place : place + 1], level)


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_chunks_make_the_whole(name: str) -> None:
    given = inputs(Case(tokens=63, sink=4, recent=20), device=device(name))
    whole = twin(name)(**given)
    start, pieces = 0, []
    for count in (1, 30, 7, 25):
        held = {x: given[x][:, :, : start + count] for x in "kv"}
        pieces.append(twin(name)(**{**given, **held, "q": given["q"][:, :, start : start + count], "start": start}))
        start += count
    agree((torch.cat([out for out, _ in pieces], 2), torch.cat([lse for _, lse in pieces], 2)), whole)


@pytest.mark.parametrize("name", TWINS)
def test_what_lies_between_is_not_read(name: str) -> None:
    given = inputs(Case(tokens=8, start=492, sink=4, recent=16), device=device(name))
    expected = define(**given)
    for x in "kv":
        given[x] = given[x].clone()
        given[x][:, :, 200:300] = float("nan")
    agree(twin(name)(**given), expected)
