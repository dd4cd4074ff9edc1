"""Tables of levels for `Levels` that are computed, not measured."""

from __future__ import annotations

import functools

import numpy as np
import torch
from scipy.optimize import fsolve
from scipy.special import ndtr, ndtri


def normal(bits: int) -> torch.Tensor:
    """The 2^bits levels with the least mean square error for a unit normal (Lloyd–Max), fp32, ascending.

    Each level is the mean of what lies nearest to it; the table is odd, so half of it is solved for.
    """
    upper = torch.tensor(_upper(bits))
    return torch.cat([-upper.flip(0), upper]).float()


@functools.cache
def _upper(bits: int) -> tuple[float, ...]:
    count = 2**bits
    start = np.sqrt(3) * ndtri((np.arange(count // 2, count) + 0.5) / count)  # levels are as dense as density^(1/3)
    return tuple(fsolve(lambda levels: _means(levels) - levels, start, xtol=1e-13).tolist())


def _means(levels: np.ndarray) -> np.ndarray:
    """E[x | x lies nearest to each level], for the positive half of the table."""
    borders = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density, beyond = np.exp(-(borders**2) / 2) / np.sqrt(2 * np.pi), ndtr(-borders)
    return (density[:-1] - density[1:]) / (beyond[:-1] - beyond[1:])
