"""Shares and their order are those that were planted."""

from __future__ import annotations

import pytest
import torch

from kvtool.analyze import recall
from kvtool.errors import InputError
from kvtool.statistics._choices import CHOICES
from kvtool.statistics.recall import BUDGETS
from kvtool.trace import Trace
from tests.analyze.traces import TOKENS, blank

NAMES = list(CHOICES)
LOOKED = torch.arange(len(NAMES)).double() / 50  # at a budget of 0.1


def planted() -> Trace:
    """A quarter of the attention is on what is always read; of the rest, choice number n finds n percent and the
    budget; in layer 1 nothing of it."""
    trace = blank("recall")
    seen = trace["recall"]
    seen["rows"] += TOKENS
    seen["counted"] += 3
    seen["always"] += 0.25 * TOKENS
    seen["bulk"] += 0.75 * TOKENS
    shares = torch.arange(len(NAMES))[:, None] / 100 + torch.tensor(BUDGETS)
    seen["mass"] += 0.75 * TOKENS * shares.double()
    seen["mass"][1] = 0
    seen["looked"] += 3 * LOOKED[:, None] * torch.tensor([0.5, 0.75, 1.0, 1.25])
    return trace


def test_the_planted_shares() -> None:
    finding = recall.find(planted())
    lines = {f"{row[0]} {row[1]}".strip(): dict(zip(finding.columns, row, strict=True)) for row in finding.rows}
    assert list(lines) == NAMES
    number = NAMES.index("page-16 mean")
    line = lines["page-16 mean"]
    share = number / 100 + 0.1
    assert line["looked"] == round(float(LOOKED[number]), 3)
    assert line["at 0.1"] == round(0.25 + 0.75 * share * 2 / 3, 3)
    assert line["bulk 0.1"] == round(share * 2 / 3, 3)
    assert (line["worst"], line["layer"]) == (0.25, 1)


def test_the_headline_names_the_best_of_the_cheap() -> None:
    headline = recall.find(planted()).headline
    best = max(number for number in range(len(NAMES)) if LOOKED[number] < 0.25)
    assert NAMES[best] in headline
    assert "25.0% being on what is always read" in headline


def test_windowed_layers_are_left_out() -> None:
    trace = planted()
    trace.model["windows"] = [None, 16, None]
    finding = recall.find(trace)
    assert finding.data["layers"] == [0, 2]
    assert all(row[-1] in (0, 2) for row in finding.rows)


def test_nothing_seen() -> None:
    with pytest.raises(InputError, match="has seen nothing"):
        recall.find(blank("recall"))
