"""A race scores a prompt once for all who score alike: nobody's numbers change, and nobody is charged less."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtool.cache.keep.memo import Memo
from kvtool.cache.keep.scores import attention
from kvtool.calibrate import calibrate
from kvtool.compare.cells import Cell
from kvtool.compare.plans import Entrant
from kvtool.compare.prompts import Prompt
from kvtool.compare.run import Race, key
from kvtool.model import Model
from kvtool.slots import Select
from tests.cache.test_onward import going

Start = Callable[..., Race]
PAUSE = 0.02  # seconds, of each layer's scoring
LAYERS = 2


def entrant(name: str, model: Model, label: str = "", **values: Any) -> Entrant:
    cell = label or f"{name}-{values}"
    return Entrant(Cell(cell, "method"), calibrate(name, values, model=model), identity=cell)


def heavy(model: Model) -> list[Entrant]:
    """One method at three budgets."""
    return [entrant("h2o", model, f"h2o@{b}", heavy=b / 2, recent=b / 2) for b in (0.5, 0.25, 0.1)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers in which attention has scored a prompt, each time slowly."""
    found: list[int] = []
    quick = attention.score

    def slow(view: Any) -> torch.Tensor:
        if not view.turn:
            found.append(view.layer)
            time.sleep(PAUSE)
        return quick(view)

    monkeypatch.setattr(attention, "score", slow)
    return found


def quality(race: Race) -> dict[Any, Any]:
    return {at: (found["bytes"], found["read"], found["scores"]) for at, found in race.journal.scores.items()}


def test_budgets_share_a_scoring_and_each_is_charged_for_it(
    race: Start, made: list[Prompt], model: Model, calls: list[int]
) -> None:
    rows, prompt = heavy(model), made[0]
    started = race(entrants=rows, steps=0)
    started.run([prompt])
    assert calls == list(range(LAYERS))
    for row in rows:
        found = started.journal.scores[key(prompt, "known", row)]
        assert found["prefill_seconds"] - found["prefill_seconds_full"] > 0.9 * LAYERS * PAUSE


def test_what_is_spent_is_what_was_spent(
    race: Start, made: list[Prompt], model: Model, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much more than all that a row does otherwise, so that a busy machine does not matter."""
    monkeypatch.setattr("tests.compare.test_shared.PAUSE", 1.0)
    rows, prompt = heavy(model)[:2], made[0]
    started = race(entrants=rows, steps=0)
    started.run([prompt])
    first, second = (started.journal.scores[key(prompt, "known", row)] for row in rows)
    assert first["spent_seconds"] > LAYERS > second["spent_seconds"]
    assert second["prefill_seconds"] > LAYERS


def test_timed_steps_score_nothing_again(race: Start, made: list[Prompt], model: Model, calls: list[int]) -> None:
    race(entrants=heavy(model)[:1], steps=2).run(made[:1])
    assert calls == list(range(LAYERS))


def test_each_prompt_and_each_protocol_is_scored_anew(
    race: Start, made: list[Prompt], model: Model, calls: list[int]
) -> None:
    race(entrants=heavy(model)[:2], steps=0).run(made[:2])  # a text, and a passkey that is asked for twice
    assert calls == 3 * list(range(LAYERS))


def test_rows_get_the_same_numbers_as_alone(
    race: Start, made: list[Prompt], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = heavy(model)
    rows += [entrant("kvzip", model, f"kvzip@{b}", budget=b, chunk=150) for b in (0.5, 0.25)]
    rows += [entrant("d2o", model, f"d2o@{b}", hh=b / 2, recent=b / 2, whole=False) for b in (0.5, 0.25)]
    together = race("together", entrants=rows, steps=0)
    together.run(made[:2])
    monkeypatch.setattr(Race, "_account", lambda self, plan, memo: None)
    alone = race("alone", entrants=rows, steps=0)
    alone.run(made[:2])
    assert together.failed == alone.failed == {}
    assert quality(together) == quality(alone)


@pytest.mark.parametrize("protocol", ["official", "strict"])
def test_who_is_fed_itself_shares_nothing(
    protocol: str, race: Start, made: list[Prompt], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where entries or tokens go while the prompt comes in, what later layers or chunks score depends on a budget."""
    rows = [entrant("keydiff", model, f"keydiff@{b}", budget=b, when="chunk") for b in (0.5, 0.25)]
    if protocol == "strict":
        rows += heavy(model)
    else:
        select = Select(torch.full((LAYERS, 2), 0.5))
        plans = [going(model, 1.0, reach, select=select) for reach in (0.5, 0.25)]
        rows += [Entrant(Cell(f"going{at}", "plan"), plan, f"going{at}") for at, plan in enumerate(plans)]
    asked: list[Memo] = []
    monkeypatch.setattr(Memo, "account", lambda self, names: asked.append(self))
    started = race(entrants=rows, steps=0, protocol=protocol)
    started.run(made[:1])
    assert (started.failed, len(started.journal.scores)) == ({}, len(rows))
    assert not asked
