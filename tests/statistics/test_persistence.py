"""Persistence of importance, entry by entry, and a text of which the answer is known."""

from __future__ import annotations

import torch

from kvtool.corpus.base import Sample
from kvtool.model import Model
from kvtool.rotary import NONE
from kvtool.statistics._base import States
from kvtool.statistics.persistence import Persistence
from tests import models
from tests.statistics.observed import TOKENS, text
from tests.tolerance import same


def test_against_weights_written_down(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    seen, half = trace["persistence"], TOKENS // 2
    assert int(seen["entries"]) == half
    for index, layer in enumerate(layers):
        sets: list[list[set[int]]] = [[], []]
        for weights in layer.weights.double():
            for which, rows in enumerate((range(half), range(half, TOKENS))):
                pairs = ((row, j) for row in rows for j in range(min(row + 1, half)))
                sets[which].append({j for row, j in pairs if float(weights[row, j]) * (row + 1) > 1})
        if layer.window is not None:
            sets = [[set()] * len(sets[0])] * 2
        same(seen["both"][index], torch.tensor([len(a & b) for a, b in zip(*sets, strict=True)]).double())
        for name, found in zip(("before", "after"), sets, strict=True):
            same(seen[name][index], torch.tensor([len(each) for each in found]).double())


def test_half_of_what_is_looked_at_later_was_looked_at_before() -> None:
    """Queries of the first half look at entry 1, those of the second at 1 or at 2."""
    g = models.shared("llama").geometry
    k = torch.zeros(g.kv_heads, 12, 8)
    k[:, 1, 1] = k[:, 2, 2] = 20.0
    q = torch.zeros(g.query_heads, 12, 8)
    q[:, 1:6, 1] = q[:, 6:, 1] = 1.0
    q[:, 9:, 1], q[:, 9:, 2] = 0.0, 1.0
    made = Persistence(None, g)
    made.states(States(0, q, k, k, 1.0, None, None, NONE, None, Sample(torch.arange(12), "text")))
    counts = [made[name][0].unique().tolist() for name in ("both", "after", "before")]
    assert counts == [[1.0], [2.0], [1.0]]
