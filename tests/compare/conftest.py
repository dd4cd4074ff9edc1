"""A tiny model with a tokenizer of bytes, prompts of it, and entrants that lose much, little and nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtool.calibrate import calibrate
from kvtool.compare.cells import Cell
from kvtool.compare.journal import Journal
from kvtool.compare.plans import Entrant
from kvtool.compare.prompts import Prompt, chosen, prompts
from kvtool.compare.run import Race, Rules
from kvtool.model import Model, load
from tests.cli.tiny import save

SETTINGS: dict[str, dict[str, Any]] = {
    "passkey": {"depths": (0.2, 0.8), "keys": 1}, "needle": {"depths": (0.5,)}, "two-hop": {"samples": 1},
    "text": {"samples": 1, "tokens": 6},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 0.3, "window": 4}, "streaming": {"sink": 2, "recent": 40},
    "kivi": {"group": 8, "recent": 16, "block": 8}, "quest": {"budget": 0.2, "page": 4, "dense": 0},
}  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(str(save(tmp_path_factory.mktemp("compare") / "tiny")))


@pytest.fixture(scope="session")
def made(model: Model) -> list[Prompt]:
    return prompts(model, chosen(("text", "passkey", "needle", "two-hop"), SETTINGS), (400, 450), 0)


@pytest.fixture(scope="session")
def field(model: Model) -> list[Entrant]:
    """The full cache, and a plan of every method above."""
    found = [Entrant(Cell("full", "control"), identity="full")]
    for name, values in METHODS.items():
        found.append(Entrant(Cell(name, "method"), calibrate(name, values, model=model), identity=name))
    return found


@pytest.fixture
def race(model: Model, field: list[Entrant], tmp_path: Path) -> Callable[..., Race]:
    """A race over a journal of this name; `rules` as in `Rules`."""

    def start(journal: str = "board", *, entrants: list[Entrant] | None = None, **rules: Any) -> Race:
        path = tmp_path / f"{journal}.jsonl"
        return Race(model, entrants or field, Journal(path, "tiny"), Rules(**{"steps": 2, **rules}))

    return start
