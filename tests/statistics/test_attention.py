"""The attention statistic against n×n attention, and card A7's known answers: uniform heads, a head with a sink."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvtool.corpus.base import Sample
from kvtool.model import Model
from kvtool.statistics._base import BINS, Rows, bin_edges, bin_of
from kvtool.statistics.attention import SHARES, Attention
from kvtool.statistics.extremes import Extremes
from kvtool_kernels.ops import attention_statistics
from tests import models
from tests.statistics.observed import TOKENS, text
from tests.tolerance import close

EDGES = bin_edges()


def by_bin(values: torch.Tensor) -> torch.Tensor:
    """[H,N] → [H,BINS], one entry at a time."""
    edges = EDGES[: values.shape[1]]
    sums = torch.zeros(len(values), BINS, dtype=torch.float64)
    for place in range(values.shape[1]):
        sums[:, max(index for index, edge in enumerate(edges) if edge <= place)] += values[:, place].double()
    return sums


def test_bins_are_half_octaves() -> None:
    edges = EDGES
    assert edges[:20] == [*range(16), 16, 23, 32, 46]
    assert all(abs(later / earlier - 2**0.5) < 0.04 for earlier, later in itertools.pairwise(edges[16:]))
    assert bin_of(torch.tensor([0, 15, 16, 22, 23, 31, 32, 2**21])).tolist() == [0, 15, 16, 16, 17, 17, 18, BINS - 1]


def test_mass_by_distance_and_by_column(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        distance = torch.stack([layer.weights.diagonal(-d, 1, 2).sum(-1) for d in range(TOKENS)], dim=1)
        close(trace["attention"]["distance"][index], by_bin(distance), torch.float32)
        close(trace["attention"]["columns"][index], by_bin(layer.weights.sum(1)), torch.float32)


def test_columns_normalised_by_the_rows_that_see_them(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        mean = layer.weights.sum(1) / layer.visible.sum(0)
        close(trace["attention"]["columns_normalised"][index], by_bin(mean), torch.float32)


def test_columns_count() -> None:
    trace, _ = text("llama")
    close(trace["attention"]["columns_count"], by_bin(torch.ones(1, TOKENS))[0])
    assert (float(trace["attention"]["tokens"]), float(trace["attention"]["sequences"])) == (TOKENS, 1)


def test_mass_of_the_top_columns(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        ranked = layer.weights.sum(1).sort(-1, descending=True).values
        expected = [ranked[:, : max(1, round(share * TOKENS))].sum(-1) / TOKENS for share in SHARES]
        close(trace["attention"]["covered"][index], torch.stack(expected, dim=1), torch.float32)


def test_entropy_in_nats(any_model: Model) -> None:
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        entropy = torch.special.entr(layer.weights).sum(-1)
        close(trace["attention"]["entropy"][index], entropy.sum(-1), torch.float32)


def test_entropy_by_the_most_there_can_be(any_model: Model) -> None:
    """H(A_i) / log(visible keys); a row with one visible key counts as 1."""
    trace, layers = text(any_model.name)
    for index, layer in enumerate(layers):
        share = torch.special.entr(layer.weights).sum(-1)[:, 1:] / layer.visible.sum(1)[1:].log()
        close(trace["attention"]["entropy_normalised"][index], 1 + share.sum(-1), torch.float32)


def rows(statistic: Attention | Extremes, q: torch.Tensor, k: torch.Tensor, window: int | None = None) -> None:
    tokens = q.shape[1]
    summary = attention_statistics(q, k, torch.zeros_like(k), scale=1.0, window=window)
    statistic.rows(Rows(0, summary, 0, Sample(torch.zeros(tokens, dtype=torch.long), "text")))


def test_uniform_attention_has_normalised_entropy_one(llama: Model) -> None:
    g, tokens = llama.geometry, 100
    statistic = Attention(llama, g)
    rows(statistic, torch.zeros(g.query_heads, tokens, g.head_dim), torch.randn(g.kv_heads, tokens, g.head_dim))
    close(statistic["entropy_normalised"][0] / statistic["tokens"], torch.ones(g.query_heads), torch.float32)
    expected = sum(math.log(row + 1) for row in range(tokens))
    close(statistic["entropy"][0], torch.full((g.query_heads,), expected), torch.float32)


def test_uniform_attention_in_a_window_has_normalised_entropy_one() -> None:
    model = models.shared("mistral-window")
    g, tokens, window = model.geometry, 100, models.WINDOW
    statistic = Attention(model, g)
    rows(statistic, torch.zeros(g.query_heads, tokens, g.head_dim), torch.randn(g.kv_heads, tokens, g.head_dim), window)
    close(statistic["entropy_normalised"][0] / statistic["tokens"], torch.ones(g.query_heads), torch.float32)


@pytest.mark.parametrize("c", [0.0, 1.0, 5.0, -3.0])
def test_a_head_with_a_logit_at_slot_zero(c: float, llama: Model) -> None:
    """All logits equal but +c at slot 0: row i has e^c / (e^c + i) on it."""
    g, tokens = llama.geometry, 80
    q, k = torch.zeros(g.query_heads, tokens, g.head_dim), torch.zeros(g.kv_heads, tokens, g.head_dim)
    q[..., 0], k[:, 0, 0] = 1.0, c
    statistic = Extremes(llama, g)
    rows(statistic, q, k)
    sink = sum(math.exp(c) / (math.exp(c) + row) for row in range(1, tokens)) / (tokens - 1)
    close(statistic["sink"][0], torch.full((g.query_heads,), sink), torch.float32)
    assert bool((statistic["sink_heads"][0] == float(sink > 0.3)).all())
