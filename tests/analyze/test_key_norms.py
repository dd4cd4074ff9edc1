"""Norms come from Gram matrices, and query heads are dealt by the released rule."""

from __future__ import annotations

import pytest
import torch

from kvtool.analyze import key_norms
from tests.analyze.traces import HEADS, KV, LAYERS, TOKENS, WIDTH, blank


def test_the_cards_known_answer() -> None:
    assert key_norms.dealt_out([1.0, 2.0, 3.0, 4.0], 12) == [0, 2, 4, 6]


@pytest.mark.parametrize("norms", [[1.0, 1.05, 1.1, 7.0, 7.1], [3.0, 2.0, 1.0], [0.1, 9.0], [5.0]])
@pytest.mark.parametrize("heads", [5, 12, 32])
def test_all_query_heads_are_dealt_whatever_the_order(norms: list[float], heads: int) -> None:
    counts = key_norms.dealt_out(norms, heads)
    assert sum(counts) == heads
    assert min(counts) >= 0
    assert key_norms.dealt_out(norms[::-1], heads) == counts[::-1]


def test_equal_norms_share_alike() -> None:
    assert key_norms.dealt_out([2.0, 2.0, 2.0], 9) == [3, 3, 3]


def test_norms_of_planted_keys() -> None:
    trace = blank("gram")
    trace["gram"]["tokens"] += TOKENS
    for head, length in enumerate((1.0, 3.0)):  # every key of a head is that long in every channel
        trace["gram"]["k"][:, head] = TOKENS * length**2 * torch.ones(WIDTH, WIDTH)
    finding = key_norms.find(trace)
    line = dict(zip(finding.columns, finding.rows[1], strict=True))
    assert (line["most/least"], line["head"], line["query heads by norm"]) == (3.0, 1, f"0 {HEADS}")
    assert line["least"] == round(WIDTH**0.5, 2)
    assert [len(finding.data["norm"]), len(finding.data["norm"][0])] == [LAYERS, KV]
    assert "a factor of 3.00" in finding.headline
