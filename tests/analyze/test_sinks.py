"""Sinks are counted, drains and peaks have the right sign and place."""

from __future__ import annotations

import torch

from kvtool.analyze import sinks
from kvtool.corpus.base import Sample
from kvtool.statistics._base import Rows
from kvtool_kernels.attention_statistics.reference import Summary
from tests.analyze.traces import HEADS, LAYERS, blank

SEQUENCES = 2


def planted():
    """Layer 1: heads 0 and 1 are sinks; its first value is small; the stream peaks before layer 2."""
    trace = blank("extremes")
    extremes = trace["extremes"]
    extremes["sequences"] += SEQUENCES
    extremes["sink"][1, :2] = SEQUENCES * 0.8
    extremes["sink_heads"][1, :2] = SEQUENCES
    extremes["value_first"] += 3.0
    extremes["value_rest"] += 3.0
    extremes["value_first"][1] = 0.3
    extremes["gap"][1] = SEQUENCES * 7.0
    extremes["stream_first"] += SEQUENCES * 10.0
    extremes["stream_rest"] = torch.full((LAYERS + 1,), 10.0, dtype=torch.float64)
    extremes["stream_first"][2] = SEQUENCES * 500.0
    extremes["massive"][2] = SEQUENCES * 1
    return trace


def test_the_planted_layer():
    finding = sinks.find(planted())
    lines = [dict(zip(finding.columns, row, strict=True)) for row in finding.rows]
    assert [line["heads > 0.3"] for line in lines] == [0.0, 0.5, 0.0]
    assert [line["sink"] for line in lines] == [0.0, 0.4, 0.0]
    assert [line["drain"] for line in lines] == [1.0, 0.1, 1.0]
    assert [line["gap"] for line in lines] == [0.0, 7.0, 0.0]
    assert [line["peak"] for line in lines] == [1.0, 1.0, 50.0]
    assert [line["massive"] for line in lines] == [0.0, 0.0, 1.0]
    assert lines[1]["most"] == 0.8


def test_the_headline():
    headline = sinks.find(planted()).headline
    assert headline.startswith("17 % of heads put more than 0.3")  # 2 of 12
    assert headline.endswith("its stream peaks at 50 times the next, before layer 2.")


def test_a_peak_after_the_last_layer():
    trace = planted()
    trace["extremes"]["stream_first"][LAYERS] = SEQUENCES * 9000.0
    assert sinks.find(trace).headline.endswith("900 times the next, after the last layer.")


def test_data_is_complete():
    data = sinks.find(planted()).data
    assert len(data["sink"]) == LAYERS
    assert len(data["sink"][0]) == HEADS
    assert len(data["peak"]) == len(data["massive"]) == LAYERS + 1
    assert data["heads"] == [0.0, 0.5, 0.0]


def test_counts_come_from_rows():
    """The statistic itself: a head whose every row but the first gives 0.5 to position 0."""
    trace = blank("extremes")
    tokens = 11
    columns = torch.zeros(HEADS, 1, tokens)
    columns[:, 0, 0] = 1  # row 0 sees only itself
    columns[0, 0, 0] += 0.5 * (tokens - 1)
    summary = Summary(columns, columns, columns, columns, columns, torch.ones(HEADS))
    for layer in range(LAYERS):
        trace["extremes"].rows(Rows(layer, summary, 0, Sample(torch.arange(tokens), "text")))
    trace["extremes"]["sequences"] += 1
    assert sinks.find(trace).data["heads"] == [1 / HEADS] * LAYERS
    assert sinks.find(trace).data["sink"][0] == [0.5, *[0.0] * (HEADS - 1)]
