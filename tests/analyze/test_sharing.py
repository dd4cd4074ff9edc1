"""One basis for several layers against bases of their own: known answers."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.analyze import sharing
from tests.analyze.traces import CHANNELS, LAYERS, TOKENS, blank, random

NEEDS = sharing.STATISTICS
RANK = CHANNELS // sharing.SHARE


def moments(*layers: torch.Tensor) -> torch.Tensor:
    z = torch.cat(layers, dim=1)
    return z.T @ z


def content(rank: int, seed: int = 0) -> torch.Tensor:
    """Tokens [400,rank] with equal energy in every direction."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(400, rank, generator=draw, dtype=torch.float64))[0]


def basis(rank: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(CHANNELS, rank, generator=draw, dtype=torch.float64))[0].T


def test_what_two_layers_both_say_in_bases_of_their_own_is_written_once() -> None:
    x = content(2 * RANK)
    loud = 1000 * x @ basis(2 * RANK, 2)
    assert float(sharing.ratio(moments(x @ basis(2 * RANK, 1), loud), 2)) == pytest.approx(0, abs=1e-9)


def test_layers_that_say_different_things_share_nothing() -> None:
    both = content(4 * RANK)
    one, two = both[:, : 2 * RANK] @ basis(2 * RANK, 1), both[:, 2 * RANK :] @ basis(2 * RANK, 2)
    assert float(sharing.ratio(moments(one, two), 2)) == pytest.approx(1)


def test_half_of_what_is_said_is_shared() -> None:
    """3 dimensions of content for two layers' 2, each of 2: of 3 units of energy one basis leaves one at most."""
    x = content(3 * RANK)
    one, two = x[:, : 2 * RANK] @ basis(2 * RANK, 1), x[:, RANK:] @ basis(2 * RANK, 2)
    assert float(sharing.ratio(moments(one, two), 2)) == pytest.approx(1 / 2)  # 1 of 4 units, against 2 of 4


def test_nothing_to_lose_is_no_gain() -> None:
    x = content(1)
    assert float(sharing.ratio(moments(x @ basis(1, 1), x @ basis(1, 2)), 2)) == 1.0
    assert float(sharing.ratio(torch.zeros(2 * CHANNELS, 2 * CHANNELS, dtype=torch.float64), 2)) == 1.0


def test_the_finding_of_a_planted_trace() -> None:
    """Layers 0 and 1 say the same, layer 2 something else."""
    trace, x, y = blank(*NEEDS), content(2 * RANK), content(2 * RANK, seed=9)
    y = y - x @ (x.T @ y)
    flat = [x @ basis(2 * RANK, 1), x @ basis(2 * RANK, 2), y @ basis(2 * RANK, 3)]
    for side in sharing.SIDES:
        for layer in range(LAYERS):
            trace["gram"][side][layer] = flat[layer].T @ flat[layer]
            for distance in range(1, LAYERS - layer):
                trace["cross-gram"][side][distance - 1, layer] = flat[layer].T @ flat[layer + distance]
    for name in NEEDS:
        trace[name]["tokens"] += TOKENS
    finding = sharing.find(trace)
    assert finding.data["basis"]["K2"][:2] == pytest.approx([0, 1], abs=1e-6)
    assert finding.rows[0][-2:] == (sharing.NOTHING, sharing.NOTHING)
    assert len(finding.rows) == LAYERS - 1


def test_arcs_of_right_angles() -> None:
    trace = random(*NEEDS, "slerp")
    for side in "kv":
        trace["slerp"][side][:] = 2 * (1 - math.cos(math.pi / 4))
        trace["slerp"][f"{side}_energy"][:] = 1.0
    finding = sharing.find(trace)
    assert finding.data["arc"]["k"] == pytest.approx([2 - math.sqrt(2)] * (LAYERS - 1), abs=1e-3)
    assert "one direction loses 0.59 and 0.59" in finding.headline
