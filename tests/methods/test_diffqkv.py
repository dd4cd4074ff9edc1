"""The ledger sees which side can lose what, and widths follow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.errors import InputError
from kvtool.methods import diffqkv
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import plan
from tests.tolerance import close, same

BRIEF: dict[str, Any] = dict(
    sink=1, recent=3, block=8, samples=2, tokens=48, steps=24, draws=8, widths=(0.25, 0.5, 0.75)
)  # fmt: skip


def decided(model: Model, **changes: Any) -> Plan:
    return plan("diffqkv", model, BRIEF | changes)


def narrow(part: str) -> Model:
    """Keys or values of every head lie in two dimensions of eight, and equal heads have equal ones."""
    model = models.build("mistral")
    for module in model.attention_modules:
        layer: Any = module
        weight = getattr(layer, part).weight.data.unflatten(0, (2, 8))
        basis = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))[0]
        weight.copy_((basis @ basis.T @ weight[0]).expand(2, 8, -1))
    return model


def test_values_of_two_dimensions_need_no_more() -> None:
    made = decided(narrow("v_proj"), budget=0.5)
    assert float(made.evidence["share"][1].max()) == 0.25
    assert float(made.evidence["share"][0].mean()) == 0.75  # all that values leave
    ledger = made.evidence["ledger"]  # layer, side (K, V), axis (heads, dims)
    close(ledger[:, 1], torch.zeros(3, 2), torch.float16)  # equal heads merge, four dimensions of two lose nothing
    assert float(ledger[:, 0].min()) > 0.1
    assert made.provenance["facts"]["ledger_share"] == 0.5


def test_one_pair_of_widths_for_the_model(llama: Model) -> None:
    share = decided(llama, unit="side").evidence["share"]
    same(share, share[:, :1, :1].expand_as(share))
    assert float(share.mean()) <= 0.5


@pytest.mark.parametrize("cut", ["rank", "channels"])
def test_bytes_are_spent_within_the_budget(llama: Model, cut: str) -> None:
    for budget in (0.3, 0.5, 0.9):
        share = decided(llama, budget=budget, cut=cut, unit="head").evidence["share"]
        assert budget - 0.25 < float(share.mean()) <= budget


def test_merged_heads_hold_their_mean() -> None:
    x = torch.randn(1, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    encoding = diffqkv.merged(6, 4, 3).of(0)
    parts = encoding.encode(x)
    assert parts["dense"].nbytes * 3 * 2 == x.nbytes  # a third of the heads, in 16 of 32 bits
    expected = x.unflatten(1, (2, 3)).mean(2, keepdim=True).expand(1, 2, 3, 5, 4).flatten(1, 2)
    close(encoding.decode(parts, 4), expected, torch.float16)


@pytest.mark.parametrize(("heads", "parts"), [(1, 2), (2, 2), (3, 3), (5, 5), (8, 2), (9, 3)])
def test_heads_merge_by_their_smallest_factor(heads: int, parts: int) -> None:
    assert diffqkv._factor(heads) == parts


def test_one_head_has_none_to_merge_with() -> None:
    made = decided(models.shared("mqa"))
    close(made.evidence["ledger"][..., 0], torch.zeros(3, 2), torch.bfloat16)
    assert float(made.evidence["ledger"][..., 1].min()) > 0.1


def test_bad_budgets(llama: Model) -> None:
    with pytest.raises(InputError, match="budget"):
        decided(llama, budget=0.0)
    with pytest.raises(InputError, match="cheapest"):
        decided(llama, budget=0.2)
