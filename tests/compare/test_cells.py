"""Which rows a scoreboard has: budgets become options by the method's own word, and what the user sets wins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtool import options, registry
from kvtool.calibrate import method
from kvtool.compare import cells as module
from kvtool.compare.cells import Cell, cells, names, random, shares
from kvtool.errors import InputError
from kvtool.model import Model

BUDGETS = [0.5, 0.1]


def made(*methods: str, settings: dict[str, dict[str, Any]] | None = None, **plans: str) -> list[Cell]:
    """The rows besides the controls."""
    return [cell for cell in cells(methods, BUDGETS, settings or {}, plans) if cell.kind != "control"]


def test_controls_come_first() -> None:
    assert [cell.key for cell in cells((), BUDGETS, {}, {})] == ["full", "random@0.5", "random@0.1"]


def test_a_budget_becomes_options() -> None:
    assert [(cell.key, cell.options) for cell in made("snapkv")] == [
        ("snapkv@0.5", {"budget": 0.5}), ("snapkv@0.1", {"budget": 0.1}),
    ]  # fmt: skip


def test_what_is_set_wins() -> None:
    assert [cell.options for cell in made("kivi", settings={"kivi": {"bits": "4"}})] == [{"bits": "4"}] * 2


def test_a_method_without_budgets_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(method("kivi"), "at")
    assert [(cell.key, cell.options) for cell in made("kivi", settings={"kivi": {"sink": "2"}})] == [
        ("kivi", {"sink": "2"})
    ]


def test_a_budget_that_a_method_cannot_keep_is_its_own_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(budget: float) -> dict[str, Any]:
        if budget < 0.2:
            raise InputError("too little")
        return {}

    monkeypatch.setattr(method("kivi"), "at", at)
    assert [cell.trouble for cell in made("kivi", "snapkv")] == ["", "too little.", "", ""]


def test_ready_plans_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = made(mine="a/mine.plan.safetensors")
    assert (cell.key, cell.kind, cell.path) == ("mine", "plan", "a/mine.plan.safetensors")
    with pytest.raises(InputError, match="one name"):
        made("draft", draft="draft.plan.safetensors")


@pytest.mark.parametrize(
    ("methods", "settings", "words"),
    [
        (["snapvk"], {}, "snapkv"),
        (["kivi"], {"kivi": {"bit": "2"}}, "bits"),
        (["kivi"], {"kivi": {"bits": "x"}}, "'x'"),
    ],
)
def test_mistakes_are_told_before_any_work(methods: list[str], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        cells(methods, BUDGETS, settings, {})


def test_shares() -> None:
    assert shares("0.1, 0.5,0.1,1") == [1.0, 0.5, 0.1]
    for bad in ("0", "1.1", "-0.5", "half", "", "nan"):
        with pytest.raises(InputError, match="--budgets"):
            shares(bad)


def test_names() -> None:
    assert names("a, b,a", "--tasks") == ["a", "b"]
    with pytest.raises(InputError, match="--tasks"):
        names(" , ", "--tasks")


@pytest.mark.parametrize("name", [name for name in registry.names("methods") if hasattr(method(name), "at")])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
def test_every_method_that_takes_budgets_takes_these(name: str, budget: float) -> None:
    options.build(method(name).Options, method(name).at(budget), name)


def test_the_random_control_draws_by_the_seed(llama: Model) -> None:
    plan = random(llama, 0.25, 3)
    assert plan.keep is not None
    assert plan.keep.select is not None
    assert (plan.keep.select.score, plan.keep.select.seed) == ("random", 3)
    assert torch.equal(plan.keep.select.budget, torch.full_like(plan.keep.select.budget, 0.25))


def test_the_registry_is_asked_by_any_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "method", lambda name: SimpleNamespace())
    assert module.registry_name("Two_Words") == "two-words"
