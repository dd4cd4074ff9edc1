"""Drafts at the command line: any plan as one, tiers, prompts of their own, and what the verdict says of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtool.calibrate import calibrate
from kvtool.commands import replay as command
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.replay.subject import Subject
from kvtool.replay.verdict import task
from tests.replay.conftest import windowed

SMALL = ["generation.prompt=60", "generation.tokens=9", "speed.length=60", "speed.steps=9"]


def replayed(model: Model, path: Path, tasks: str, draft: int | None = None) -> dict[str, Any]:
    small = [one for one in SMALL if one.split(".")[0] in tasks]
    record, _ = command.run(
        model.name, str(path), tasks, small, False, 0, [], None, 0, "cpu", "float32", False, draft=draft
    )
    return record


@pytest.mark.parametrize("name", ["streaming", "snapkv", "kivi", "quest", "draft"])
def test_any_plan_drafts(name: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {
        "streaming": {"sink": 2, "recent": 9}, "snapkv": {"budget": 0.3, "window": 4},
        "kivi": {"group": 8, "recent": 16, "block": 8}, "quest": {"budget": 0.2, "page": 4}, "draft": {"tokens": 1},
    }[name]  # fmt: skip
    path = tmp_path / "a.plan"
    calibrate(name, values, model=model).write(str(path))
    record = replayed(model, path, "text,generation", draft=3)
    assert (record["drafts"], record["nudged"], list(record["tasks"])) == (3, None, ["generation"])
    assert record["metrics"]["identical"] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "drafts 3 tokens a round; the full cache verifies: the output is its own" in said
    assert "left out, since they would judge it: text" in said


def test_a_bad_number_of_tokens(model: Model, tmp_path: Path) -> None:
    windowed(model).write(str(tmp_path / "a.plan"))
    with pytest.raises(InputError, match="bad draft"):
        replayed(model, tmp_path / "a.plan", "generation", draft=0)


def test_a_lossy_draft_is_called_so(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for eta in (0.0, 10.0):
        path = tmp_path / f"{eta}.plan"
        calibrate("rapid", {"eta": eta, "question": 8, "chunk": 8}, model=model).write(str(path))
        record = replayed(model, path, "generation")
        said = " ".join(capsys.readouterr().err.split())
        assert record["nudged"] == (eta or None)
        assert ("LOSSY" in said, "the output is its own" in said) == (eta > 0, eta == 0)
        if not eta:
            assert record["metrics"]["identical"] == 1


def test_bytes_of_all_tiers(model: Model) -> None:
    module = task("speed")
    options = module.Options(length=60, steps=9)

    def held(**settings: Any) -> dict[str, float]:
        plan = calibrate("triforce", {"budget": 16, "chunk": 4, "sink": 2} | settings, model=model)
        return module.run(Subject(model, plan), options, lambda text: None).metrics

    two, three = held(), held(window=10)
    g = model.geometry
    entry = 2 * 4 * g.layers * g.kv_heads * g.head_dim
    assert three["bytes_held"] - two["bytes_held"] >= 12 * entry
    assert two["bytes_held"] > two["bytes_held_full"] + 16 * entry
    assert three["bytes_read"] > 0
