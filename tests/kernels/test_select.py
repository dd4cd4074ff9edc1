"""Pages and lists: bounds hold, known pages win, and attention over a list is attention over what it names."""

from __future__ import annotations

import importlib

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.select.reference import attend_selected as define
from kvtool_kernels.select.spec import CASES, Case, inputs
from tests.kernels.test_attend import agree
from tests.kernels.twins import device, names
from tests.tolerance import close

TWINS = names("select")


def bounds(k: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest key of each page; the last one may be short."""
    parts = k.split(page, 2)
    return torch.stack([part.amin(2) for part in parts], 2), torch.stack([part.amax(2) for part in parts], 2)


def twin(name: str) -> object:
    return importlib.import_module(f"kvtool_kernels.select.{name}").attend_selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_twins(name: str, case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype=dtype, device=device(name))
    agree(twin(name)(**given), define(**given))


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_a_list_of_everything_in_any_order_is_attention(name: str) -> None:
    given = inputs(Case(batch=2, tokens=3, entries=100), device=device(name))
    given["indices"] = (
        torch.stack([torch.randperm(100) for _ in range(4)]).int().reshape(2, 2, 100).to(given["q"].device)
    )
    agree(twin(name)(**given), ops.attend(*(given[x] for x in "qkv"), scale=given["scale"]))


@pytest.mark.parametrize("name", ["reference", *TWINS])
def test_heads_have_lists_of_their_own(name: str) -> None:
    given = inputs(Case(entries=50, listed=2, holes="none"), device=device(name))
    given["indices"] = torch.tensor([[[7, -1], [20, 49]]], dtype=torch.int32, device=given["q"].device)
    out, _ = twin(name)(**given)
    close(out[:, :2], given["v"][:, :1, 7:8].expand(1, 2, 1, 64))
    picked = {x: given[x][:, 1:, [20, 49]] for x in "kv"}
    close(out[:, 2:], ops.attend(given["q"][:, 2:], picked["k"], picked["v"], scale=given["scale"])[0])


@pytest.mark.parametrize("name", TWINS)
def test_entries_that_are_not_listed_are_not_read(name: str) -> None:
    given = inputs(Case(batch=2, tokens=2, entries=200), device=device(name))
    expected = define(**given)
    for row in range(2):
        for head in range(2):
            listed = given["indices"][row, head]
            others = torch.ones(200, dtype=torch.bool, device=listed.device)
            others[listed[listed >= 0].long()] = False
            for x in "kv":
                given[x][row, head, others] = float("nan")
    agree(twin(name)(**given), expected)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("entries", [1, 16, 63, 500])
def test_scores_bound_every_logit_of_the_page(entries: int, page: int) -> None:
    given = inputs(Case(tokens=3, entries=entries))
    low, high = bounds(given["k"], page)
    pages = -(-entries // page)
    assert low.shape == high.shape == (1, 2, pages, 64)
    scores = ops.page_scores(given["q"], low, high)
    assert scores.shape == (1, 4, 3, pages)
    logits = given["q"] @ given["k"].repeat_interleave(2, 1).transpose(2, 3)
    best = torch.stack([part.amax(-1) for part in logits.split(page, -1)], -1)
    assert bool((scores >= best - 1e-4).all())
    if page == 1:
        close(scores, logits)


def test_scores_by_the_formula() -> None:
    given = inputs(Case(tokens=2, entries=63))
    low, high = bounds(given["k"], 8)
    q = given["q"][:, :, :, None]
    ends = [x.repeat_interleave(2, 1)[:, :, None] for x in (low, high)]
    close(ops.page_scores(given["q"], low, high), torch.maximum(q * ends[0], q * ends[1]).sum(-1))
