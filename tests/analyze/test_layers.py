"""Similarities with known answers, and the layer that matters."""

from __future__ import annotations

import pytest
import torch

from kvtool.analyze import layers
from kvtool.analyze._similarity import cka, overlap
from kvtool.errors import InputError
from tests.analyze.traces import KV, LAYERS, TOKENS, WIDTH, random

NEEDS = layers.STATISTICS


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ basis.T


def test_overlap_of_equal_disjoint_and_half_equal_subspaces():
    axes = torch.eye(16, dtype=torch.float64)
    first, second = projector(axes[:, :2]), projector(axes[:, 2:4])
    matrix = overlap(torch.stack([first, 7 * first, second, projector(axes[:, 1:3])]))  # r = 2, chance 1/8
    assert matrix[0].tolist() == pytest.approx([1, 1, -1 / 7, 3 / 7], abs=1e-9)
    assert matrix.diagonal().tolist() == pytest.approx([1] * 4)


def test_overlap_of_random_subspaces_is_nothing():
    bases = torch.linalg.qr(torch.randn(20, 64, 8, dtype=torch.float64)).Q
    matrix = overlap(bases @ bases.transpose(1, 2)).fill_diagonal_(0)
    assert abs(float(matrix.mean())) < 0.01


def blocks(*states: torch.Tensor) -> torch.Tensor:
    """[T,C] of each layer → [N,L,K,64,D]"""
    return torch.stack([x.reshape(-1, 64, KV, WIDTH).transpose(1, 2) for x in states], 1)


def test_cka_is_blind_to_basis_scale_and_offset():
    x = torch.randn(256, KV * WIDTH, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(KV * WIDTH, KV * WIDTH, dtype=torch.float64)).Q
    matrix = cka(blocks(x, 3 * x @ turn, x + 5, torch.randn_like(x)))
    assert matrix[0, 1] == pytest.approx(1)
    assert matrix[0, 2] == pytest.approx(1)
    assert abs(matrix[0, 3]) < 0.05


def test_cka_needs_the_reservoir():
    assert set(layers.find(random(*NEEDS)).data["similarity"]) == {"overlap_k", "overlap_v"}
    trace = random(*NEEDS, "reservoir")
    matrices = layers.find(trace).data["similarity"]
    assert set(matrices) == {"overlap_k", "overlap_v", "cka_k", "cka_v"}
    trace["reservoir"]["priority"].fill_(layers.FREE)  # no block was taken
    assert "cka_k" not in layers.find(trace).data["similarity"]


def test_the_layer_that_does_least():
    trace = random(*NEEDS)
    trace["residual"]["attention"] = TOKENS * torch.tensor([0.5, 0.99, 0.9], dtype=torch.float64)
    finding = layers.find(trace)
    assert finding.data["importance"]["attention"] == [0.5, 0.01, 0.1]
    assert finding.data["least_important_attention"] == [1, 2, 0]
    assert finding.headline.startswith("Attention changes the stream least in layers 1, 2, 0;")


def test_adjacent_layers():
    trace = random(*NEEDS)
    trace["neighbours"]["k"] = TOKENS * torch.tensor([[0.4, 0.2], [1.0, 1.0]], dtype=torch.float64)
    finding = layers.find(trace)
    place = finding.columns.index("cos K")
    assert [row[place] for row in finding.rows] == [0.3, 1.0, "–"]
    assert finding.data["neighbours"]["k"] == [[0.4, 0.2], [1.0, 1.0]]
    assert len(finding.rows) == LAYERS


def test_every_need_is_named():
    with pytest.raises(InputError, match="--stat residual --stat gram"):
        layers.find(random("neighbours"))
