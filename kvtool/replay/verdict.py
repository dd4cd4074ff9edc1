"""One replay: run the tasks, collect one verdict, and hold it to bounds. It knows no task by name."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvtool import registry
from kvtool.errors import InputError, unknown
from kvtool.plan import Plan
from kvtool.replay.subject import Progress, Result, Subject

_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Verdict:
    """Results by task, and how they came about."""

    results: dict[str, Result]
    facts: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value for result in self.results.values() for name, value in result.metrics.items()}

    def record(self) -> dict[str, Any]:
        """One JSON-able document."""
        return {**self.facts, "metrics": self.metrics, "tasks": {name: r.detail for name, r in self.results.items()}}

    def broken(self, bounds: list[str]) -> list[str]:
        """The bounds ("recall<0.9" fails when true) that this verdict breaks; a metric that is NaN breaks every bound.

        Raises InputError for a bound that cannot be read, or on a metric that was not measured.
        """
        found = []
        for bound in bounds:
            name, compare, limit = parse(bound)
            if name not in self.metrics:
                raise unknown("metric", name, self.metrics)
            if math.isnan(self.metrics[name]) or compare(self.metrics[name], limit):
                found.append(f"{bound} (it is {self.metrics[name]:.4g})")
        return found


def parse(bound: str):
    """ "recall<0.9" → (name, comparison, limit)."""
    match = re.fullmatch(r"\s*([\w-]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", bound)
    try:
        name, sign, limit = match.groups() if match else ("", "", "")
        return name.replace("-", "_"), _OPERATORS[sign], float(limit)
    except (KeyError, ValueError) as error:
        raise InputError(
            "cannot read the bound", got=repr(bound), expected="like 'recall<0.9' or 'bytes_ratio>0.6'"
        ) from error


def check(bounds: list[str], tasks: Iterable[str], *, drafts: bool = True) -> None:
    """Raise InputError, before any work, for a bound that cannot be read or that none of these tasks measures; without
    `drafts`, under plans that do not draft."""
    known = [
        metric for name in tasks for metric in task(name).METRICS
        if drafts or metric not in getattr(task(name), "DRAFTED", ())
    ]  # fmt: skip
    for bound in bounds:
        name, _, _ = parse(bound)
        if name not in known:
            raise unknown("metric", name, known)


def task(name: str):
    """The module of one task."""
    return registry.module("replay/tasks", name, "task")


def judging(tasks: Iterable[str], plan: Plan) -> list[str]:
    """Those of the tasks that say something about the plan: a draft's output is the full cache's, so that tasks which
    judge output would judge the full cache. Raises InputError if none is left."""
    found = [name for name in tasks if plan.draft is None or getattr(task(name), "DRAFTS", False)]
    if not found:
        raise InputError(
            "the plan only drafts, and the full cache verifies: these tasks would judge the full cache",
            got=", ".join(tasks), remedy="run generation or speed, or the plan without its draft",
        )  # fmt: skip
    return found


def replay(subject: Subject, tasks: dict[str, Any], progress: Progress = lambda text: None) -> Verdict:
    """Run the tasks, given as name → options; those that would judge the full cache are left out (see `judging`)."""
    tasks = {name: tasks[name] for name in judging(tasks, subject.plan)}
    with subject.model.served():
        results = {name: task(name).run(subject, options, progress) for name, options in tasks.items()}
    facts = {
        "kind": "verdict",
        "model": subject.model.name,
        "plan": {"method": subject.plan.method, "options": subject.plan.options},
        "drafts": None if subject.plan.draft is None else subject.plan.draft.tokens,
        "nudged": None if subject.plan.draft is None else subject.plan.draft.eta or None,
        "protocol": subject.protocol,
        "chunk": subject.chunk,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": str(subject.model.device),
        "seed": subject.seed,
    }
    return Verdict(results, facts)
