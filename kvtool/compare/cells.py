"""The rows of a scoreboard: a method at a budget, a ready plan, or a control.

A method file says with `at(budget) -> options` under which options about that share of the full cache's bytes is held,
on prompts of the lengths that are compared. One without it has a single cell, under its defaults. What the user sets
wins over both. It knows no method by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtool import options, registry
from kvtool.calibrate import method
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Select

FULL, RANDOM = "full", "random"
SINK, RECENT = 4, 32  # entries that the random control always keeps


@dataclass(frozen=True)
class Cell:
    """`kind`: "method", "plan" (made before) or "control". `line`: what cells that differ in budget alone share.
    `trouble`: why there is no plan to be had, known before any work."""

    line: str
    kind: str
    budget: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    trouble: str = ""

    @property
    def key(self) -> str:
        """What the cell is called; no two of a scoreboard share it."""
        return self.line if self.budget is None else f"{self.line}@{self.budget:g}"


def cells(
    methods: Sequence[str], budgets: Sequence[float], settings: Mapping[str, Mapping[str, Any]],
    plans: Mapping[str, str],
) -> list[Cell]:  # fmt: skip
    """All rows: the controls first. `plans`: name → path.

    Raises InputError for a method or a setting that there is not, and for two rows of one name.
    """
    made = [Cell(FULL, "control"), *(Cell(RANDOM, "control", budget) for budget in budgets)]
    for name in methods:
        made += _of(registry_name(name), budgets, settings.get(registry_name(name), {}))
    made += [Cell(name, "plan", path=path) for name, path in plans.items()]
    keys = [cell.key for cell in made]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError("two rows have one name", got=key, remedy="name every method once, and rename the plan")
    return made


def registry_name(name: str) -> str:
    """The method as the folder spells it; raises InputError when there is none."""
    method(name)
    return registry.spelled(name)


def _of(name: str, budgets: Sequence[float], chosen: Mapping[str, Any]) -> list[Cell]:
    module = method(name)
    options.build(module.Options, chosen, name)
    at = getattr(module, "at", None)
    if at is None:
        return [Cell(name, "method", options=dict(chosen))]
    found = []
    for budget in budgets:
        try:
            values = {**at(budget), **chosen}
            options.build(module.Options, values, name)
            found.append(Cell(name, "method", budget, values))
        except InputError as error:
            found.append(Cell(name, "method", budget, trouble=str(error)))
    return found


def shares(text: str) -> list[float]:
    """ "0.5,0.25" → budgets, the largest first. Raises InputError for what is no share."""
    found = options.convert(text, tuple[float, ...], "--budgets")
    for budget in found:
        if not 0 < budget <= 1:
            raise InputError("bad --budgets", got=f"{budget:g}", expected="shares above 0 and up to 1, like 0.5,0.25")
    return sorted(set(found), reverse=True)


def names(text: str, what: str) -> list[str]:
    """ "a,b" → ["a", "b"], each once."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InputError(f"{what} names nothing", expected="one name or more, like a,b")
    return found


def every_method() -> list[str]:
    return registry.names("methods")


def random(model: Model, budget: float, seed: int) -> Plan:
    """The control: entries drawn by lot, besides a few sinks and recent ones."""
    everything = torch.ones(model.geometry.layers, model.geometry.kv_heads, dtype=torch.bool)
    select = Select(torch.full(everything.shape, budget), score="random", sink=SINK, recent=RECENT, seed=seed)
    keep = Keep.heads(everything, sink=0, recent=1, select=select)
    return Plan(RANDOM, model.fingerprint, {"budget": budget, "sink": SINK, "recent": RECENT}, keep=keep)
