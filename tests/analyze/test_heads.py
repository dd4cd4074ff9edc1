"""Planted heads are found, named and classed; statistics may be missing."""

from __future__ import annotations

import pytest
import torch

from kvtool.analyze import heads
from kvtool.errors import InputError
from kvtool.statistics._base import bin_of
from tests.analyze.traces import HEADS, LAYERS, blank, random


def planted(*names: str):
    """Retrieval at 2.3 (and weaker at 1.1), induction at 0.2, echo at 1.3; of the rest, 0.0 a sink, 0.1 recent."""
    trace = blank(*names)
    if "retrieval" in names:
        trace["retrieval"]["counted"] += 4
        trace["retrieval"]["prompts"] += 5
        trace["retrieval"]["score"][2, 3] = 4 * 0.9
        trace["retrieval"]["score"][1, 1] = 4 * 0.2
    if "induction" in names:
        trace["induction"]["rows"] += 300
        trace["induction"]["induction"][2, 3] = 300 * 0.8
        trace["induction"]["induction"][0, 2] = 300 * 0.5
        trace["induction"]["echo"][1, 3] = 300 * 0.6
    if "attention" in names:
        attention, far, near = trace["attention"], bin_of(torch.tensor(200)), 0
        attention["tokens"] += 1000
        attention["distance"][..., far] = 1000.0
        attention["columns"][..., far] = 1000.0
        attention["entropy_normalised"] += 250
        attention["columns"][0, 0, far], attention["columns"][0, 0, :4] = 400.0, 150.0
        attention["distance"][0, 1, far], attention["distance"][0, 1, near] = 100.0, 900.0
    return trace


def test_planted_heads_are_classed():
    finding = heads.find(planted("retrieval", "induction", "attention"))
    kinds = finding.data["query_heads"]["class"]
    assert kinds[0] == ["sink", "recent", "induction", "mixed"]
    assert kinds[1] == ["mixed", "retrieval", "mixed", "echo"]
    assert kinds[2] == ["mixed", "mixed", "mixed", "retrieval"]
    counts = {"retrieval": 2, "induction": 1, "echo": 1, "sink": 1, "recent": 1, "mixed": 6}
    assert finding.data["counts"] == counts
    assert finding.data["above"] == {"retrieval": 2, "induction": 2, "echo": 1, "sink": 1, "recent": 1}


def test_scores_are_shares():
    scores = heads.find(planted("retrieval", "induction", "attention")).data["query_heads"]
    assert scores["retrieval"][2][3] == 0.9
    assert scores["induction"][0][2] == 0.5
    assert scores["sink"][0][0] == 0.6
    assert scores["recent"][0][1] == 0.9
    assert scores["entropy"] == [[0.25] * HEADS] * LAYERS


def test_the_borders_of_sink_and_recent():
    trace = planted("attention")
    attention = trace["attention"]
    for key, border in (("columns", 4), ("distance", 64)):
        inside, outside = (int(bin_of(torch.tensor(place))) for place in (border - 1, border))
        attention[key].zero_()
        attention[key][..., inside], attention[key][..., outside] = 200.0, 800.0
    scores = heads.find(trace).data["query_heads"]
    assert scores["sink"] == scores["recent"] == [[0.2] * HEADS] * LAYERS


def test_the_strongest_leads_the_table_and_the_headline():
    finding = heads.find(planted("retrieval", "induction", "attention"))
    first = dict(zip(finding.columns, finding.rows[0], strict=True))
    assert (first["head"], first["KV"], first["retrieval"], first["class"]) == ("2.3", 1, 0.9, "retrieval")
    assert "2.3 (retrieval 0.90)" in finding.headline
    assert finding.data["order"][:3] == [[2, 3], [1, 1], [0, 2]]
    assert finding.rows[-1][0] == "6 heads"


def test_a_kv_head_takes_the_best_score_and_the_mean_mass():
    data = heads.find(planted("retrieval", "induction", "attention")).data["kv_heads"]
    assert data["retrieval"] == [[0.0, 0.0], [0.2, 0.0], [0.0, 0.9]]
    assert data["sink"][0] == [0.3, 0.0]
    assert data["class"][0] == ["mixed", "induction"]


@pytest.mark.parametrize("name", heads.STATISTICS)
def test_any_one_statistic_is_enough(name):
    finding = heads.find(planted(name))
    cells = dict(zip(finding.columns, finding.rows[0], strict=True))
    missing = {column for column, value in cells.items() if value == "–"}
    known = {"induction": {"induction", "echo"}, "attention": {"sink", "recent", "entropy"}}
    assert missing == set(heads.SCORES) - known.get(name, {name})
    leader = {"retrieval": "2.3", "induction": "2.3", "attention": "0.2"}
    assert cells["head"] == leader[name]


def test_unanswered_needles_are_said():
    trace = planted("retrieval", "induction")
    trace["retrieval"]["counted"].zero_()
    finding = heads.find(trace)
    assert "retrieval" not in finding.data["query_heads"]
    assert finding.headline.endswith("No retrieval score: 5 needle prompts, none answered.")


def test_nothing_to_go_by():
    with pytest.raises(InputError, match="no statistic 'retrieval'"):
        heads.find(blank("gram"))
    with pytest.raises(InputError, match="empty: got No retrieval score: 0 needle prompts"):
        heads.find(blank("retrieval"))


def test_maps_are_drawn_if_there():
    without = {"heads-scores", "heads-distance"}
    assert set(heads.find(random(*heads.STATISTICS)).figures) == without
    assert set(heads.find(random(*heads.STATISTICS, "maps")).figures) == without | {"heads-maps"}
    assert set(heads.find(planted("induction")).figures) == {"heads-scores"}
