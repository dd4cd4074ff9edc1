"""The verdict: one JSON document, and bounds on its numbers."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import pytest

from kvtool.commands import replay as command
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.parsing._shared import document
from kvtool.plan import Plan, compose
from kvtool.replay.subject import Result, Subject
from kvtool.replay.verdict import Verdict, check, judging, parse, replay, task
from kvtool.slots import Draft
from tests.replay.conftest import windowed
from tests.replay.test_tasks import SMALL

VERDICT = Verdict(
    {"a": Result({"recall": 0.5, "bytes_ratio": 0.25}), "b": Result({"kl": math.nan})}, {"kind": "verdict"}
)


def test_the_record_is_json(model: Model) -> None:
    tasks = {name: task(name).Options(**options) for name, options in SMALL.items()}
    verdict = replay(Subject(model, windowed(model), "strict", 17, 5), tasks)
    record = verdict.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(document(record))
    facts = {key: record[key] for key in ("kind", "protocol", "chunk", "dtype", "device", "seed")}
    assert facts == {
        "kind": "verdict", "protocol": "strict", "chunk": 17, "dtype": "float32", "device": "cpu", "seed": 5,
    }  # fmt: skip
    assert record["plan"]["method"] == "by hand"
    assert set(record["tasks"]) == set(SMALL)
    drafted = {metric for name in SMALL for metric in getattr(task(name), "DRAFTED", ())}
    assert set(record["metrics"]) == {metric for name in SMALL for metric in task(name).METRICS} - drafted
    assert record["drafts"] is None


def test_what_json_has_no_word_for_is_null() -> None:
    assert json.loads(document(VERDICT.record()))["metrics"] == {"recall": 0.5, "bytes_ratio": 0.25, "kl": None}


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("recall<0.9", ("recall", operator.lt, 0.9)),
        (" recall <= .9 ", ("recall", operator.le, 0.9)),
        ("bytes-ratio>1e-3", ("bytes_ratio", operator.gt, 1e-3)),
        ("kl>=-1", ("kl", operator.ge, -1.0)),
    ],
)
def test_parsed(bound: str, expected: tuple[str, object, float]) -> None:
    assert parse(bound) == expected


@pytest.mark.parametrize(
    "bound", ["", "recall", "recall=0.9", "recall==1", "recall<", "<1", "recall<a", "a<1<2", "a b<1"]
)
def test_unreadable(bound: str) -> None:
    with pytest.raises(InputError, match="cannot read the bound"):
        parse(bound)


@pytest.mark.parametrize(
    ("bound", "broken"),
    [
        ("recall<0.5", False), ("recall<=0.5", True), ("recall>0.5", False), ("recall>=0.5", True),
        ("recall<0.6", True), ("bytes-ratio>0.2", True), ("kl<0", True), ("kl>0", True),
    ],
)  # fmt: skip
def test_broken(bound: str, broken: bool) -> None:
    assert [found.split(" (")[0] for found in VERDICT.broken([bound])] == [bound] * broken


def test_metrics_that_nobody_measures() -> None:
    with pytest.raises(InputError, match="Did you mean 'recall'"):
        VERDICT.broken(["recal<1"])
    check(["recall<1", "kl>1"], ["passkey", "text"])
    with pytest.raises(InputError, match="unknown metric"):
        check(["recall<1"], ["text"])
    check(["acceptance<1"], ["generation"])
    with pytest.raises(InputError, match="unknown metric"):
        check(["acceptance<1"], ["generation"], drafts=False)


def test_a_draft_is_not_judged_by_the_full_caches_output(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = compose(windowed(model), Plan("draft", model.fingerprint, draft=Draft(2)))
    with pytest.raises(InputError, match="would judge the full cache"):
        judging(["passkey", "text"], made)
    assert judging(["text", "speed"], windowed(model)) == ["text", "speed"]
    path, small = made.write(str(tmp_path / "c.plan.safetensors")), ["generation.prompt=30", "generation.tokens=7"]

    def run(tasks: str, bounds: list[str]) -> tuple[dict[str, Any], list[str]]:
        return command.run(model.name, path, tasks, small, False, 0, bounds, None, 0, "cpu", "float32", False)

    record, broken = run("passkey,text,generation", ["acceptance<0", "identical<1"])
    said = " ".join(capsys.readouterr().err.split())
    assert "would judge it: passkey, text" in said
    assert "drafts 2 tokens a round; the full cache verifies" in said
    assert broken == []
    assert (list(record["tasks"]), record["drafts"], record["metrics"]["same_tokens"]) == (["generation"], 2, 7)
    assert record["plan"]["method"] == "by hand + draft"
    with pytest.raises(InputError, match="unknown metric"):
        run("passkey,generation", ["recall<1"])
