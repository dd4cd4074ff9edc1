"""The rows of benchmarks name options that there are, and tables have the columns that were measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from kvtool import options
from kvtool.calibrate import method, reads
from kvtool.trace import statistic

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def rows(name: str) -> list[tuple[str, dict[str, Any]]]:
    made = runpy.run_path(str(BENCHMARKS / f"{name}.py"))
    if name == "decode_cases":
        return [case for cases in made["GROUPS"].values() for case in cases.values()]
    return [case for _, cases in made["CASES"] for case in cases]


@pytest.mark.parametrize("name", ["decode_cases", "encoding_cases"])
def test_rows_can_be_asked_for(name: str) -> None:
    for entry, settings in rows(name):
        module = method(entry)
        for needed in reads(module, options.build(module.Options, settings, entry)):
            statistic(needed)


def test_what_is_timed_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert runpy.run_path(str(BENCHMARKS / "kernels.py"))["parity"]("cpu") > 100


def test_titles_of_decode_steps_are_told_apart() -> None:
    groups = runpy.run_path(str(BENCHMARKS / "decode_cases.py"))["GROUPS"]
    titles = [title for cases in groups.values() for title in cases]
    assert len(titles) == len(set(titles))


def test_a_scoreboard_has_columns_for_the_tasks_that_were_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found: dict[str, Any] = {
        "known": {"acceptance": {"acceptance": 0.75, "sampled": 0.5}}, "bytes_ratio": 0.25, "prefill_ratio": 1.0,
        "quality_known": None, "quality_after": None,
    }  # fmt: skip
    row = {"name": "quest@0.25", "kind": "method", "budget": 0.25, "error": None, "skipped": False,
           "calibration_seconds": 12.0, "all": found}  # fmt: skip
    timed = {**row, "name": "kivi@0.25", "all": found | {"decode_ratio": 0.875}}
    failed = {"name": "duo@0.25", "kind": "method", "budget": 0.25, "error": "no gates", "skipped": False}

    def printed(*rows: dict[str, Any]) -> list[str]:
        (tmp_path / "board.json").write_text(json.dumps({"rows": rows}))
        runpy.run_path(str(BENCHMARKS / "scoreboard.py"))["main"](str(tmp_path / "board.json"), None)
        return capsys.readouterr().out.splitlines()

    assert printed(row, failed) == [
        "|  | bytes | acceptance | prefill × | calibration |",
        "| --- | --- | --- | --- | --- |",
        "| `duo@0.25` | no gates |  |  |  |",
        "| `quest@0.25` | 0.250 | 0.750/0.500 | 1.00 | 12 s |",
    ]
    assert printed(row, timed) == [
        "|  | bytes | acceptance | prefill × | decode × | calibration |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `kivi@0.25` | 0.250 | 0.750/0.500 | 1.00 | 0.88 | 12 s |",
        "| `quest@0.25` | 0.250 | 0.750/0.500 | 1.00 |  | 12 s |",
    ]
