"""Levels fitted to a histogram are the best that there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtool.encoding import codebook
from tests.tolerance import close, same


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) / 4).clamp(-1, 1)


def cost(x: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> float:
    return float((weights * (x[:, None] - levels).square().amin(1)).double().sum())


def by_hand(x: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """The least cost over all ways to cut the sorted numbers into runs."""
    order = x.argsort()
    x, weights = x[order].double(), weights[order].double()
    costs = []
    for cuts in itertools.combinations(range(1, len(x)), count - 1):
        runs = [slice(a, b) for a, b in itertools.pairwise((0, *cuts, len(x)))]
        means = [(weights[run] * x[run]).sum() / weights[run].sum() for run in runs]
        costs.append(sum((weights[r] * (x[r] - m).square()).sum() for r, m in zip(runs, means, strict=True)))
    return float(min(costs))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 4])
def test_no_cut_into_runs_is_better(count: int, seed: int) -> None:
    x = draw(11, seed)
    weights = torch.rand(11, generator=torch.Generator().manual_seed(seed)) + 0.01
    levels = codebook.levels(codebook.histogram(x, weights), count)
    close(torch.tensor(cost(x, weights, levels)), torch.tensor(by_hand(x, weights, count)))


def test_levels_of_a_gaussian() -> None:
    """Lloyd–Max levels of a unit normal (from the literature, to its three digits)."""
    levels = codebook.levels(codebook.histogram(draw(2_000_000)), 4) * 4
    close(levels, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), torch.float16)


def test_levels_at_hand_are_found_exactly() -> None:
    table = torch.tensor([-1.0, -0.37, 0.21, 0.97])
    same(codebook.levels(codebook.histogram(table.repeat(7)), 4), table)


def test_fewer_numbers_than_levels() -> None:
    levels = codebook.levels(codebook.histogram(torch.tensor([0.5, -0.25, 0.5])), 4)
    same(levels, torch.tensor([-0.25, 0.5, 0.5, 0.5]))
    same(codebook.levels(torch.zeros(2, codebook.BINS), 4), torch.linspace(-1, 1, 4))


def test_symmetric_numbers_have_symmetric_levels() -> None:
    half = 0.05 + draw(300).abs().clamp(max=0.9)
    levels = codebook.levels(codebook.histogram(torch.cat([half, -half])), 4)
    close(levels, -levels.flip(0), torch.float16)  # two bins' borders may be equally good


def test_weights_draw_levels() -> None:
    x = torch.linspace(-1, 1, 101)
    weights = torch.where(x > 0.5, 1e3, 1.0)
    levels = codebook.levels(codebook.histogram(x, weights), 4)
    assert int((levels > 0.5).sum()) == 3
    assert int((codebook.levels(codebook.histogram(x), 4) > 0.5).sum()) == 1


def test_histograms_add_up() -> None:
    x = draw(1000)
    close(codebook.histogram(x[:300]) + codebook.histogram(x[300:]), codebook.histogram(x))


def test_moments_and_what_snaps() -> None:
    x, table = draw(50_000), torch.tensor([-0.4, 0.0, 0.3])
    counted = codebook.histogram(x)
    mean, size = codebook.moments(counted)
    close(torch.stack([mean, size]), torch.stack([x.mean(), x.std(correction=0)]).double(), torch.float32)
    near = table[(x[:, None] - table).abs().argmin(1)]
    mean, size = codebook.moments(codebook.snapped(counted, table))
    close(torch.stack([mean, size]), torch.stack([near.mean(), near.std(correction=0)]).double(), torch.float16)
