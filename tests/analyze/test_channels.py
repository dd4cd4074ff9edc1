"""A planted outlier channel is named, with its size; keys after RoPE and values are told apart."""

from __future__ import annotations

import torch

from kvtool.analyze import channels
from kvtool.corpus.base import Sample
from kvtool.rotary import NONE
from kvtool.statistics._base import States
from tests.analyze.traces import CHANNELS, HEADS, KV, LAYERS, WIDTH, blank

TOKENS = 50


def seen(keys: torch.Tensor, values: torch.Tensor):
    """A trace of keys and values [L,K,T,D] of a model without RoPE."""
    trace = blank("channels")
    sample = Sample(torch.arange(TOKENS), "text")
    for layer in range(LAYERS):
        q = torch.zeros(HEADS, TOKENS, WIDTH)
        trace["channels"].states(States(layer, q, keys[layer], values[layer], 1.0, None, None, NONE, None, sample))
    return trace


def signs() -> torch.Tensor:
    return torch.rand(LAYERS, KV, TOKENS, WIDTH).round() * 2 - 1


def test_planted_outliers_are_named():
    keys, values = signs(), signs()
    keys[1, 1, :, 5] = 12.0  # an offset
    values[2, 0, 7, 3] = -6.0  # one token
    finding = channels.find(seen(keys, values))
    of_kind = {kind: [o for o in finding.data["outliers"] if o["kind"] == kind] for kind in channels.KINDS}
    place = {"layer": 1, "head": 1, "channel": 5, "max": 12.0, "peak": 12.0, "mean": 12.0, "ratio": 12.0}
    assert of_kind["k_pre"] == [{"kind": "k_pre", **place, "offset": 1.0}]
    assert of_kind["k"] == [{"kind": "k", **place, "offset": 1.0}]
    (spike,) = of_kind["v"]
    assert (spike["layer"], spike["head"], spike["channel"], spike["peak"]) == (2, 0, 3, 6.0)
    assert spike["ratio"] == 1.1  # one token in fifty
    assert finding.rows[0] == ("K pre", 1, 1, 5, 12.0, 12.0, 12.0, 12.0, 1.0)
    assert "1 in keys before RoPE (to 12.0×)" in finding.headline


def test_no_outlier():
    finding = channels.find(seen(signs(), signs()))
    assert finding.rows == []
    assert finding.headline.startswith(f"Of {LAYERS * CHANNELS} channels")
    assert finding.headline.endswith("0 in keys before RoPE, 0 in keys after RoPE, 0 in values.")
    assert finding.data["magnitude"]["v"] == [[[1.0] * WIDTH] * KV] * LAYERS


def test_the_table_holds_the_largest():
    keys = signs()
    loud = torch.arange(3 * 7).reshape(LAYERS, 7)
    keys[:, 0, :, :7] *= (10.0 + loud)[:, None, :]  # 7 of 16 channels of each layer
    finding = channels.find(seen(keys, signs()))
    assert len(finding.data["outliers"]) == 2 * 3 * 7
    assert len(finding.rows) == 2 * channels.TOP
    assert [row[4] for row in finding.rows[:3]] == [30.0, 29.0, 28.0]


def test_silence_is_not_an_error():
    nothing = torch.zeros(LAYERS, KV, TOKENS, WIDTH)
    assert channels.find(seen(nothing, nothing)).data["outliers"] == []
