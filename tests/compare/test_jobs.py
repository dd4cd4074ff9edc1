"""Several processes: what happens when one of them cannot go on. What they find is in tests/cli/test_compare.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtool.compare import jobs
from kvtool.compare.journal import Journal
from kvtool.compare.plans import Entrant
from kvtool.compare.prompts import Prompt
from kvtool.compare.run import Race, Rules
from kvtool.errors import InputError, RunError
from kvtool.model import Model


def broken() -> Model:
    raise InputError("no such model")


def dying() -> Model:
    os._exit(3)


@pytest.mark.parametrize(("loaded", "told"), [(broken, "failed: no such model"), (dying, "exit code 3.*--jobs")])
def test_the_race_ends_with_a_process(
    loaded: Callable[[], Model], told: str, model: Model, made: list[Prompt], field: list[Entrant], tmp_path: Path
) -> None:
    race = Race(model, field, Journal(tmp_path / "board.jsonl", "tiny"), Rules())
    with pytest.raises(RunError, match=told):
        jobs.run(race, made, 2, loaded)


def test_nothing_is_left_to_do(model: Model, made: list[Prompt], tmp_path: Path) -> None:
    jobs.run(Race(model, [], Journal(tmp_path / "board.jsonl", "tiny"), Rules()), made, 2, broken)
