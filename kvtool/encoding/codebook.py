"""The best table of levels for numbers whose histogram is known: weighted k-means in one dimension.

    min over levels  Σ_i w_i · min_j (x_i − level_j)²

Numbers are counted in `BINS` bins between −1 and 1, each with its weight and weighted sum, so that bins that hold one
number hold it exactly, and histograms add up. In one dimension the clusters are runs of bins: dynamic programming finds
the best borders among `CELLS` places, then again among the bins near those, until none moves.
"""

from __future__ import annotations

import torch

BINS, CELLS = 4096, 512
NEAR, ROUNDS = 16, 20  # bins by which a border may move in a round, and rounds


def histogram(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """x and weights of one shape, x from −1 to 1 → Σ w and Σ w·x per bin, fp64 [2,BINS]; weights None: 1 each."""
    flat = x.flatten().double()
    index = ((flat + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    weight = torch.ones_like(flat) if weights is None else weights.flatten().double()
    total = torch.zeros(2, BINS, dtype=torch.float64, device=x.device)
    return total.index_add_(1, index, torch.stack([weight, weight * flat]))


def moments(counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of what a histogram has counted."""
    weight, total = counted
    mean = total.sum() / weight.sum()
    centre = total / weight.clamp_min(torch.finfo(torch.float64).tiny)
    return mean, ((weight * (centre - mean).square()).sum() / weight.sum()).sqrt()


def snapped(counted: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The histogram of what the counted numbers become when each takes its nearest level: fp64 [2,len(levels)]."""
    weight, total = counted
    table = levels.double()
    centre = total / weight.clamp_min(torch.finfo(torch.float64).tiny)
    nearest = torch.bucketize(centre, (table[1:] + table[:-1]) / 2)
    taken = torch.zeros(len(table), dtype=torch.float64).index_add_(0, nearest, weight)
    return torch.stack([taken, taken * table])


def levels(counted: torch.Tensor, count: int) -> torch.Tensor:
    """histogram fp64 [2,BINS] → `count` ascending levels, fp32; with fewer occupied bins the last one repeats."""
    counted = counted.cpu()
    counted = counted[:, counted[0] > 0]
    size = counted.shape[1]
    if not size:
        return torch.linspace(-1, 1, count, dtype=torch.float32)
    first = torch.zeros(3, size + 1, dtype=torch.float64)  # sums of w, w·x and w·x² of all bins before one
    first[:, 1:] = torch.cat([counted, counted[1:].square() / counted[:1]]).cumsum(1)
    runs = min(count, size)
    coarse = torch.linspace(0, size, min(CELLS, size) + 1, dtype=torch.float32).long()
    borders = _borders(first, [coarse] * (runs - 1))
    for _ in range(ROUNDS):
        near = [(border + torch.arange(-NEAR, NEAR + 1)).clamp(0, size).unique() for border in borders]
        moved = _borders(first, near)
        if torch.equal(moved, borders):
            break
        borders = moved
    taken = first[:, torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), size)])].diff(dim=1)
    table = taken[1] / taken[0]
    return torch.cat([table, table[-1:].expand(count - runs)]).float()


def _borders(first: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
    """The best borders between runs of bins, int64, one of each tensor of places."""
    ends = [*places, torch.tensor([first.shape[1] - 1])]
    before, lowest = torch.tensor([0]), torch.zeros(1, dtype=torch.float64)
    cuts = []
    for end in ends:
        lowest, cut = (lowest[:, None] + _cost(first, before, end)).min(0)
        cuts.append(cut)
        before = end
    found, at = [], 0
    for place, cut in zip(reversed(places), reversed(cuts[1:]), strict=True):
        at = int(cut[at])
        found.append(int(place[at]))
    return torch.tensor(found[::-1], dtype=torch.int64)


def _cost(first: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Σ w (x − mean)² of the bins from low [M] to high [N], fp64 [M,N]; infinite for none."""
    weight, total, square = first[:, None, high] - first[:, low, None]
    cost = square - total.square() / weight.clamp_min(torch.finfo(torch.float64).tiny)
    return cost.clamp_min(0).masked_fill(high <= low[:, None], float("inf"))
