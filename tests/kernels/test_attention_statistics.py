"""Twins of `attention_statistics` against its definition, which is itself checked against its formula row by row."""

from __future__ import annotations

import pytest
import torch

from kvtool_kernels.attention_statistics.spec import CASES, Case, inputs
from tests.kernels.twins import device, names, reference, twin
from tests.tolerance import close

define = reference("attention_statistics")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", names("attention_statistics"))
def test_twins(name: str, case: Case) -> None:
    given = inputs(case, device=device(name))
    actual, expected = twin("attention_statistics", name)(**given), define(**given)
    for field in expected._fields:
        size = getattr(expected, field).abs().max().clamp_min(1.0)  # sums over rows, and log-sum-exps of any size
        close(getattr(actual, field) / size, getattr(expected, field) / size)


@pytest.mark.parametrize("name", names("attention_statistics"))
def test_outputs_keep_their_dtype(name: str) -> None:
    given = inputs(Case(), dtype=torch.bfloat16, device=device(name))
    actual, expected = twin("attention_statistics", name)(**given), define(**given)
    assert actual.out.dtype == expected.out.dtype == torch.bfloat16
    close(actual.out, expected.out)
    close(actual.columns, expected.columns, torch.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=20, cells=6, first=7),
        Case(tokens=20, cells=30, window=5),
        Case(tokens=20, sinks=True, softcap=2.0, size=3.0),
    ],
    ids=str,
)
def test_the_definition_row_by_row(case: Case) -> None:
    given = inputs(case)
    summary, group = define(**given), case.heads // case.kv_heads
    expected = {name: torch.zeros_like(getattr(summary, name)) for name in summary._fields}
    for head in range(case.heads):
        for row in range(case.tokens):
            low = 0 if case.window is None else max(0, row - case.window + 1)
            logits = given["scale"] * given["k"][head // group, low : row + 1] @ given["q"][head, row]
            if case.softcap is not None:
                logits = case.softcap * torch.tanh(logits / case.softcap)
            total = logits.exp().sum() + (given["sink_logits"][head].exp() if case.sinks else 0.0)
            weights = logits.exp() / total
            expected["out"][head, row] = weights @ given["v"][head // group, low : row + 1]
            expected["lse"][head, row] = total.log()
            expected["entropy"][head, row] = -(weights * weights.log()).sum()
            expected["columns"][head, row * case.cells // case.tokens, low : row + 1] += weights
            if row == 0:
                expected["corner"][head] = weights[0]
            if row >= case.first:
                expected["distance"][head, : row - low + 1] += weights.flip(0)
    for name, value in expected.items():
        close(getattr(summary, name), value)


@pytest.mark.parametrize("name", names("attention_statistics"))
@pytest.mark.parametrize("offset", [-3e4, -3e8, 3e8])
def test_equal_logits_of_any_size_are_uniform_attention(offset: float, name: str) -> None:
    given = inputs(Case(tokens=130, size=0.0, offset=offset), device=device(name))
    summary = twin("attention_statistics", name)(**given)
    seen = torch.arange(1, 131)
    close(summary.out.cpu(), (given["v"].cpu().cumsum(1) / seen[:, None]).repeat_interleave(2, 0))
    close(summary.entropy.cpu(), seen.log().expand(4, -1))


@pytest.mark.parametrize("name", names("attention_statistics"))
def test_mass_is_conserved(name: str) -> None:
    given = inputs(Case(tokens=260, cells=6), device=device(name))
    summary = twin("attention_statistics", name)(**given)
    close(summary.columns.sum((1, 2)) / 260, torch.ones(4))
    close(summary.distance.sum(1) / 260, torch.ones(4))
