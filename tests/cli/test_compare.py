"""`kvtool compare`: the files it writes, what it goes on from, and what it refuses before any work."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvtool.compare.run import Race
from tests.cli.terminal import files, kv

SMALL = (
    "--lengths", "400", "--budgets", "0.5,0.2", "--tasks", "text,passkey", "--steps", "2",
    "--set", "passkey.depths=0.2,0.8", "--set", "passkey.keys=1", "--set", "text.samples=1", "--set", "text.tokens=4",
    "--set", "snapkv.window=8",
)  # fmt: skip
WRITTEN = {f"board.{kind}" for kind in ("json", "csv", "png", "jsonl")}
CLOCK = ("seconds", "prefill_ratio", "decode_ratio", "forced_gap")


def timeless(value: Any) -> Any:
    """A record without what the clock says."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not any(word in key for word in CLOCK)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def board(model: Path, here: Path) -> list[object]:
    return ["compare", model, "--methods", "snapkv", "-o", "board", *SMALL]


def test_a_scoreboard(board: list[object], plan: Path, here: Path) -> None:
    ran = kv(*board, "--plan", plan).fine()
    assert ran.out.decode().split() == ["board.json", "board.csv", "board.png"]
    plans = {f"board.plans/snapkv@{budget}.plan.safetensors" for budget in ("0.5", "0.2")}
    assert files(here) == WRITTEN | plans
    record = json.loads(Path("board.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["full", "random@0.5", "random@0.2", "snapkv@0.5", "snapkv@0.2", "razor.plan"]
    assert rows["full"]["all"]["bytes_ratio"] == 1
    assert rows["full"]["all"]["known"]["text"]["agreement"] == 1
    assert rows["snapkv@0.2"]["all"]["bytes_ratio"] < 0.21 < rows["snapkv@0.5"]["all"]["bytes_ratio"] < 0.51
    assert set(rows["razor.plan"]["all"]["after"]["passkey"]["depths"]) == {"0.2", "0.8"}
    assert rows["snapkv@0.5"]["calibration_seconds"] >= 0  # a geometry needs less than what is rounded away
    lines = list(csv.DictReader(Path("board.csv").read_text().splitlines()))
    assert [line["length"] for line in lines] == ["all", "400"] * len(rows)
    assert math.isclose(float(lines[6]["bytes_ratio"]), rows["snapkv@0.5"]["all"]["bytes_ratio"])
    assert Path("board.png").read_bytes()[:4] == b"\x89PNG"
    for word in ("snapkv@0.2", "passkey recall by depth", "known/after", "calibrated"):
        assert word in ran.err


def test_jobs_find_what_one_race_finds(board: list[object], plan: Path, here: Path) -> None:
    """The same record but for the clock, and one journal, from which either goes on."""
    kv(*board, "--plan", plan).fine()
    alone = json.loads(Path("board.json").read_text())
    several = kv(*board, "--plan", plan, "--jobs", 2, "--force").fine()
    assert timeless(json.loads(Path("board.json").read_text())) == timeless(alone)
    lines = len(Path("board.jsonl").read_text().splitlines())
    kv(*board, "--plan", plan, "--resume").fine()
    assert len(Path("board.jsonl").read_text().splitlines()) == lines
    assert "snapkv@0.2" in several.err


def test_an_interrupt_and_a_resume_are_one_run(
    board: list[object], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kv(*board, "--json").fine().document
    judge, calls = Race._judge, 0

    def interrupting(self: Race, *given: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return judge(self, *given)

    monkeypatch.setattr(Race, "_judge", interrupting)
    parted = [argument if argument != "board" else "parted" for argument in board]
    ran = kv(*parted)
    assert (ran.code, ran.out) == (130, b"")
    assert "--resume" in ran.err
    monkeypatch.setattr(Race, "_judge", judge)
    kv(*parted).refused("parted.jsonl exists already", "--resume", "--force")
    again = kv(*parted, "--resume", "--json").fine().document
    text = json.dumps(timeless(again)).replace("parted.", "board.")
    assert json.loads(text) == timeless(whole)


def test_one_failed_method_does_not_lose_the_others(board: list[object], here: Path) -> None:
    """kivi's groups of 32 channels do not fit heads of 8; draft has nothing to compare, which is no failure."""
    board[3] = "snapkv,kivi,draft"
    ran = kv(*board)
    assert ran.code == 1
    assert "failed: kivi@0.5, kivi@0.2" in ran.err.splitlines()[-1]
    rows = {row["name"]: row for row in json.loads(Path("board.json").read_text())["rows"]}
    assert "32 channels" in rows["kivi@0.5"]["error"]
    assert (rows["draft"]["skipped"], rows["snapkv@0.5"]["error"]) == (True, None)
    kv(*board, "--resume", "--set", "kivi.group=8", "--set", "kivi.block=8").fine()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--methods snapvk", ["unknown method", "'snapkv'"]),
        ("--methods ,", ["--methods names nothing"]),
        ("", ["nothing to compare", "--methods"]),
        ("--methods snapkv --budgets 1.5", ["--budgets", "1.5"]),
        ("--methods snapkv --budgets half", ["--budgets", "'half'"]),
        ("--methods snapkv --tasks speed", ["task of a comparison", "'speed'", "passkey"]),
        ("--methods snapkv --tasks text --quality passkey", ["--quality", "passkey"]),
        ("--methods snapkv --lengths 0", ["--lengths", "0"]),
        ("--methods snapkv --ask before", ["--ask", "'before'", "after"]),
        ("--methods snapkv --set kivi.bits=2", ["not compared", "kivi"]),
        ("--methods snapkv --set snapkv.windw=2", ["windw", "'window'"]),
        ("--methods snapkv --set passkey.key=2", ["key", "'keys'"]),
        ("--methods snapkv --chunk 0", ["--chunk", "0"]),
        ("--methods snapkv --plan nowhere", ["no such plan", "nowhere"]),
        ("--methods snapkv --plan -", ["--plan -"]),
        ("--methods snapkv -o -", ["several files"]),
        ("--methods snapkv -o nowhere/board", ["folder does not exist"]),
        ("--methods snapkv --trace nowhere", ["no such file"]),
    ],
)
def test_refused_before_any_work(arguments: str, words: list[str], here: Path) -> None:
    kv("compare", "no-such-model", *arguments.split()).refused(*words)
    assert files(here) == set()


def test_another_models_journal_and_too_short_prompts(board: list[object], model: Path, here: Path) -> None:
    kv("compare", model, "--methods", "snapkv", "--lengths", "60").refused("too short", "60 tokens")
    assert files(here) == set()
    Path("board.jsonl").write_text('{"kind": "comparison", "schema": 1, "identity": "another"}\n')
    kv(*board, "--resume").refused("another comparison", "--force")
    kv(*board, "--force").fine()
