"""Ranks and entropies of spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.analyze import spectra
from kvtool.analyze._ranks import blocks, effective_rank, energy_rank, truncated_entropy
from tests.analyze.traces import CHANNELS, KV, LAYERS, TOKENS, WIDTH, blank


def low_rank(rank: int, width: int) -> torch.Tensor:
    """A projector: `rank` equal eigenvalues."""
    basis = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64)).Q
    return basis @ basis.T


def planted():
    trace = blank("gram")
    gram = trace["gram"]
    gram["tokens"] += TOKENS
    gram["k_pre"] += TOKENS * low_rank(5, CHANNELS)
    gram["v"] += TOKENS * torch.eye(CHANNELS, dtype=torch.float64)
    for name in ("k", "q"):
        gram[name] += 9 * TOKENS * low_rank(2, WIDTH)
    return trace


def test_planted_ranks():
    data = spectra.find(planted()).data
    joint, heads = data["joint"], data["heads"]
    assert joint["k_pre"]["effective_rank"] == [5.0] * LAYERS
    assert joint["k_pre"]["rank_90"] == joint["k_pre"]["rank_99"] == [5] * LAYERS
    assert joint["v"]["rank_90"] == [math.ceil(0.9 * CHANNELS)] * LAYERS
    assert heads["v"]["rank_90"] == [[math.ceil(0.9 * WIDTH)] * KV] * LAYERS
    assert heads["k"]["rank_99"] == [[2] * KV] * LAYERS
    assert heads["k"]["singular_values"][0][0][:2] == [3.0, 3.0]
    assert data["query_entropy"][0][0] == pytest.approx(math.log(2) / math.log(WIDTH), rel=1e-4)


def test_the_table_says_them():
    finding = spectra.find(planted())
    first = dict(zip(finding.columns, finding.rows[0], strict=True))
    assert (first["K eff"], first["K 90/95/99"], first["V 90/95/99"]) == (5.0, "5/5/5", "15/16/16")
    assert first["K−mean 90"] == "–"  # no means in this trace
    assert finding.rows[-1][0] == "mean"
    assert "5 of 16 dimensions of keys before RoPE and in 15 of values" in finding.headline


def test_a_constant_offset_passes_for_a_low_rank_unless_centred():
    trace = blank("gram", "channels")
    offset = 10 * torch.ones(CHANNELS, dtype=torch.float64)
    noise = low_rank(4, CHANNELS)
    noise -= noise @ offset[:, None] @ offset[None] / offset.square().sum()
    covariance = noise @ noise.T
    for name in ("gram", "channels"):
        trace[name]["tokens"] += TOKENS
    trace["gram"]["k_pre"] += TOKENS * (covariance + offset[:, None] * offset)
    trace["channels"]["k_pre.sum"] += TOKENS * offset.reshape(KV, WIDTH)
    joint = spectra.find(trace).data["joint"]
    assert joint["k_pre"]["rank_90"] == [1] * LAYERS
    assert joint["k_pre"]["centred_rank_90"][0] >= 3
    trace["channels"]["tokens"] += 1  # of other tokens
    assert spectra.find(trace).data["joint"]["k_pre"]["centred_rank_90"] == [None] * LAYERS


KNOWN = [(1, 0.0), (2, 0.1429), (8, 0.4286), (32, 0.7143), (64, 0.4286), (128, 0.25)]


@pytest.mark.parametrize(("rank", "entropy"), KNOWN)
def test_truncated_entropy(rank, entropy):
    """The card's known answers: equal eigenvalues, cut at 32, in units of ln 128."""
    values = torch.zeros(128, dtype=torch.float64)
    values[:rank] = 3.0
    assert float(truncated_entropy(values, 128)) == pytest.approx(entropy, abs=1e-4)


def test_ranks_by_energy():
    values = torch.tensor([90.0, 5.0, 4.0, 1.0], dtype=torch.float64)
    assert [float(energy_rank(values, share)) for share in (0.9, 0.95, 0.99, 1.0)] == [1, 2, 3, 4]
    equal = torch.ones(10, dtype=torch.float64)  # nine times 0.1 is less than 0.9 in floating point
    assert float(energy_rank(equal, 0.9)) == 9
    nothing = torch.zeros(4, dtype=torch.float64)
    assert float(energy_rank(nothing, 0.9)) == float(effective_rank(nothing)) == 0.0


def test_blocks_are_the_heads():
    gram = torch.arange(36.0).reshape(1, 6, 6)
    assert torch.equal(blocks(gram, 2)[0, 1], gram[0, 3:, 3:])
