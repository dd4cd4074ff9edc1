"""From planted scores to the table, the sheet and the figure."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

from kvtool.compare import board, figure
from kvtool.compare.cells import Cell
from kvtool.compare.journal import Journal
from kvtool.compare.plans import Entrant
from kvtool.compare.prompts import Prompt
from kvtool.compare.run import key
from kvtool.corpus.base import Sample

ASKS = ("known", "after")
DEPTHS = {"passkey": (0.1, 0.9)}


def prompt(task: str, length: int, depth: float, seed: int) -> Prompt:
    tokens = torch.arange(length) + 1000 * seed
    question = None if task == "text" else length - 3
    return Prompt(task, Sample(tokens, task, tokens[:2], length=length, depth=depth, question=question), seed == 0)


PROMPTS = [
    *(prompt("passkey", length, depth, int(10 * depth)) for length in (20, 40) for depth in (0.1, 0.9)),
    prompt("text", 20, 0.0, 0), prompt("text", 40, 0.0, 0),
]  # fmt: skip
ENTRANT = Entrant(Cell("half", "method", 0.5), None, "id", "half.plan", 1.5)


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    """Every key at depth 0.1 is found; the others only if the question is known; half of the bytes are held."""
    journal = Journal(tmp_path / "board.jsonl", "one")
    for one in PROMPTS:
        for ask in ASKS if one.task == "passkey" else ASKS[:1]:
            text = {"loss_full": 1.0, "loss": 1.5, "kl": 0.25, "agreement": 0.75}
            found: dict[str, Any] = {
                "bytes": 10, "bytes_full": 20, "read": 5, "read_full": 20, "prefill_seconds": 1.1,
                "prefill_seconds_full": 1.0, "spent_seconds": 1.0,
                "scores": text if one.task == "text" else {"hit": float(one.sample.depth == 0.1 or ask == "known")},
            }  # fmt: skip
            if one.first:
                found |= {"decode_seconds": 1.0, "decode_seconds_full": 2.0, "forced_gap": 1e-6}
            journal.score(key(one, ask, ENTRANT), found)
    return board.record(ENTRANT, PROMPTS, journal, ASKS, "", ["passkey"], DEPTHS)


def test_tallies(row: dict[str, Any]) -> None:
    whole = row["all"]
    assert (whole["bytes_ratio"], whole["read_ratio"], whole["decode_ratio"]) == (0.5, 0.25, 0.5)
    assert whole["prefill_ratio"] == pytest.approx(1.1)
    assert (whole["quality_known"], whole["quality_after"]) == (1.0, 0.5)
    assert [whole["after"]["passkey"]["depths"][depth]["recall"] for depth in ("0.1", "0.9")] == [1.0, 0.0]
    found = binomtest(2, 4).proportion_ci(method="wilson")
    assert whole["after"]["passkey"]["interval"] == (found.low, found.high)
    assert whole["after"]["passkey"]["prompts"] == 4
    assert row["lengths"]["20"]["after"]["passkey"]["prompts"] == 2
    assert whole["known"]["text"] == {
        "perplexity_ratio": math.exp(0.5), "kl": 0.25, "agreement": 0.75, "prompts": 2,
    }  # fmt: skip
    assert "text" not in whole["after"]


def test_the_sheet(row: dict[str, Any]) -> None:
    failed = board.record(Entrant(Cell("bad", "method")), PROMPTS, Journal.__new__(Journal), ASKS, "why", [], {})
    lines = list(csv.DictReader(io.StringIO(board.sheet([row, failed]))))
    assert [(line["name"], line["length"]) for line in lines] == [
        ("half@0.5", "all"), ("half@0.5", "20"), ("half@0.5", "40"), ("bad", "all"),
    ]  # fmt: skip
    assert (lines[0]["known.passkey.recall"], lines[0]["after.passkey.depths.0.9.recall"]) == ("1.0", "0.0")
    assert (lines[3]["error"], lines[3]["bytes_ratio"]) == ("why", "")


def point(line: str, budget: float, held: float, quality: float, error: str | None = None) -> dict[str, Any]:
    name = f"{line}@{budget:g}"
    if error:
        return {"name": name, "line": line, "error": error}
    part = {"bytes_ratio": held, "quality_known": quality, "quality_after": quality / 2}
    return {"name": name, "line": line, "error": None, "all": part}


def test_the_figure_names_the_front_and_only_it() -> None:
    full = {"name": "full", "line": "full", "error": None,
            "all": {"bytes_ratio": 1.0, "quality_known": 1.0, "quality_after": 1.0}}  # fmt: skip
    many = [point(f"grey{index}", budget, budget + 0.01, 0.3 * budget) for index in range(28) for budget in (0.5, 0.2)]
    rows = [full, point("best", 0.5, 0.5, 0.9), point("best", 0.1, 0.1, 0.4), point("bad", 0.1, 0, 0, "no"), *many]
    drawing = Figure()
    figure.draw(drawing, rows, ASKS, "recall")
    known, after = drawing.axes
    for axis in (known, after):
        assert [text.get_text() for text in axis.texts] == ["best@0.1", "best@0.5"]
    (legend,) = drawing.legends
    assert [text.get_text() for text in legend.get_texts()] == ["best", *(f"grey{index}" for index in range(28))]
