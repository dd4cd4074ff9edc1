"""Windows are found where the mass was planted."""

from __future__ import annotations

import torch

from kvtool.analyze import locality
from kvtool.statistics._base import bin_of
from kvtool.statistics.jumps import BINS
from kvtool.trace import Trace
from tests.analyze.traces import HEADS, TOKENS, blank


def planted() -> Trace:
    """Layer 0 looks at itself, layer 1 at distance 100, layer 2 at itself but for head 3, which looks 600 back; in
    layer 1 half of the mass is a sink's."""
    trace = blank("attention")
    seen = trace["attention"]
    seen["tokens"] += TOKENS
    near, middle, far = (int(bin_of(torch.tensor(distance))) for distance in (0, 100, 600))
    seen["distance"][0, :, near] = TOKENS
    seen["distance"][1, :, middle] = 0.45 * TOKENS
    seen["distance"][1, :, far] = 0.55 * TOKENS
    seen["columns"][1, :, 0] = 0.5 * TOKENS
    seen["distance"][2, : HEADS - 1, near] = TOKENS
    seen["distance"][2, HEADS - 1, far] = TOKENS
    return trace


def test_the_planted_windows() -> None:
    finding = locality.find(planted())
    lines = [dict(zip(finding.columns, row, strict=True)) for row in finding.rows]
    assert [line["recent 16"] for line in lines] == [1.0, 0.0, 0.75]
    assert [line["recent 256"] for line in lines] == [1.0, 0.45, 0.75]
    assert [line["recent 1024"] for line in lines] == [1.0, 1.0, 1.0]
    assert [line["window"] for line in lines] == [1, 128, 725]  # borders are half octaves: 100 < 128, 600 < 724
    assert [line["sink"] for line in lines] == [0.0, 0.5, 0.0]


def test_the_head_that_looks_far() -> None:
    trace = planted()
    trace["attention"]["distance"][2, HEADS - 1] *= 0.2
    trace["attention"]["distance"][2, HEADS - 1, 0] += 0.8 * TOKENS
    finding = locality.find(trace)
    line = dict(zip(finding.columns, finding.rows[2], strict=True))
    assert (line["window"], line["worst"], line["of head"]) == (1, 0.8, f"2.{HEADS - 1}")
    assert finding.data["worst_head"][2] == HEADS - 1
    assert "nearest in 0, 2, 1" in finding.headline
    assert "in 2 of 3 layers" in finding.headline


def test_mass_that_no_window_holds() -> None:
    trace = blank("attention")
    trace["attention"]["tokens"] += TOKENS
    trace["attention"]["distance"][..., -1] = TOKENS
    finding = locality.find(trace)
    assert [row[6] for row in finding.rows] == ["–"] * 3
    assert finding.data["window"] == [None] * 3
    assert finding.headline == "In none of the 3 layers does a window hold 90% of the attention."


def test_a_layer_that_no_window_holds_is_told_apart() -> None:
    trace = planted()
    trace["attention"]["distance"][1] = 0
    trace["attention"]["columns"][1] = 0
    trace["attention"]["distance"][1, :, -1] = TOKENS
    finding = locality.find(trace)
    assert finding.data["window"] == [1, None, 725]
    assert "the nearest 1 to 725, by layer: nearest in 0, 2, farthest in 2, 0; in 2 of 3" in finding.headline
    assert finding.headline.endswith("in 1 no window holds so much.")


def shared() -> Trace:
    """Layer 1 looks at half of what layer 0 does, which holds a quarter of what its own choice would; layer 2 at none
    of it. Queries keep their direction in layer 0 and turn by a right angle in the others."""
    trace = planted()
    more = blank("layer-overlap", "jumps")
    trace.statistics |= more.statistics
    overlap, jumps = trace["layer-overlap"], trace["jumps"]
    overlap["rows"] += 10
    overlap["overlap"] += 10 * torch.tensor([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    overlap["mass"] += 10 * torch.tensor([[0.8, 0.2, 0], [0, 0.8, 0], [0, 0, 0.4]])
    jumps["count"][0, :, -1] = 5
    jumps["count"][1:, :, BINS // 2] = 5
    jumps["overlap"][0, :, -1] = 4
    jumps["overlap"][1:, :, BINS // 2] = 1
    return trace


def test_across_layers_and_along_tokens() -> None:
    finding = locality.find(shared())
    lines = [dict(zip(finding.columns, row, strict=True)) for row in finding.rows]
    assert [line["shared"] for line in lines] == ["–", 0.5, 0.0]
    assert [line["kept"] for line in lines] == [0.8, 0.2, 0.2]
    assert finding.data["found"][0] == [1.0, 0.25, 0.0]
    assert finding.data["cosine"] == [0.9875, 0.0125, 0.0125]
    assert "finds 0% to 25% of what the next layer's own choice would" in finding.headline
    assert set(finding.figures) == {"locality", "locality-overlap", "locality-steps"}


def test_layers_with_windows_choose_nothing() -> None:
    trace = shared()
    trace.model["windows"] = [None, 16, None]
    for name in ("count", "overlap"):
        trace["jumps"][name][1] = 0  # as the statistic leaves them
    finding = locality.find(trace)
    lines = [dict(zip(finding.columns, row, strict=True)) for row in finding.rows]
    assert [line["shared"] for line in lines] == ["–", "–", 0.0]
    assert [line["kept"] for line in lines] == [0.8, "–", 0.2]
    assert finding.data["found"][0] == [1.0, None, 0.0]
    assert finding.data["jaccard"] == [0.8, None, 0.2]
    assert "Jaccard index of 0.20 to 0.80, queries a cosine of 0.01 to 0.99" in finding.headline
