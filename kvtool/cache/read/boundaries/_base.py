"""From how much of a boundary each place is to where units begin. A rule is a file with

    values(job) -> [B,N]      how much speaks for a unit that begins with an entry; −inf where nothing is known

by the keys and the queries of one layer (see `prefills/_base.py` for `Job`). Boundaries are the places above a
threshold, the highest first, none within `apart` of a higher one, and so many at most: one-dimensional suppression
of what is not maximal (DHSA, arXiv 2510.24606).
"""

from __future__ import annotations

import torch


def chosen(values: torch.Tensor, above: float, apart: int, most: int) -> torch.Tensor:
    """values [B,N] → bool [B,N]: the boundaries, of which there are `most` at most; ties go to the earlier place."""
    count = values.shape[1]
    rank = torch.argsort(torch.argsort(values, dim=1, descending=True, stable=True), dim=1)
    height = (count - rank).to(torch.float64)  # 1 … N: no two places are alike
    alive, found = values > above, torch.zeros_like(values, dtype=torch.bool)
    while bool(alive.any()):
        standing = torch.where(alive, height, 0.0)
        peaks = alive & (standing == _highest(standing, apart))
        found |= peaks
        alive &= _highest(peaks.double(), apart) == 0
    order = torch.argsort(torch.where(found, height, 0.0), dim=1, descending=True)[:, :most]
    return found & torch.zeros_like(found).scatter(1, order, True)


def _highest(x: torch.Tensor, apart: int) -> torch.Tensor:
    """The maximum of x [B,N] within `apart` places."""
    return torch.nn.functional.max_pool1d(x[:, None], 2 * apart + 1, 1, apart)[:, 0]


def begins(found: torch.Tensor, first: int, near: int) -> torch.Tensor:
    """Boundaries bool [B,N] → where units begin among entries first … near − 1, int64 [B,U], `near` where a row has
    fewer; N may be less than `near`."""
    inside = found[:, first + 1 : near]
    width = int(inside.sum(1).max()) if inside.numel() else 0
    places = torch.arange(first + 1, first + 1 + inside.shape[1], device=found.device)
    places = torch.where(inside, places, near).sort(1).values[:, :width]
    return torch.nn.functional.pad(places, (1, 0), value=first)
