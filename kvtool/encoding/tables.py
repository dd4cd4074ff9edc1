"""Tables of levels for `Levels` that are computed, not measured."""

from __future__ import annotations

import functools

import numpy as np
import torch
from scipy.optimize import fsolve
from scipy.special import ndtr, ndtri

GRID, ROUNDS = 1 << 16, 2000  # points of a quarter circle; steps of Lloyd's iteration


def normal(bits: int) -> torch.Tensor:
    """The 2^bits levels with the least mean square error for a unit normal (Lloyd–Max), fp32, ascending.

    Each level is the mean of what lies nearest to it; the table is odd, so half of it is solved for.
    """
    upper = torch.tensor(_upper(bits), dtype=torch.float32)
    return torch.cat([-upper.flip(0), upper]).float()


@functools.cache
def quarter(bits: int, channels: int) -> torch.Tensor:
    """The 2^bits angles in [0, π/2] with the least mean square error for atan2(‖b‖, ‖a‖), fp32, ascending, a and b of
    so many normal numbers each: the density is ∝ sin^(channels−1)(2ψ)."""
    angles = (np.arange(GRID) + 0.5) * (np.pi / 2 / GRID)
    mass = np.sin(2 * angles) ** (channels - 1)
    below, moment = (np.concatenate([[0.0], np.cumsum(x)]) for x in (mass, mass * angles))
    shares = (np.arange(2**bits) + 0.5) / 2**bits
    levels = np.interp(shares, below[1:] / below[-1], angles)
    for _ in range(ROUNDS):
        borders = np.searchsorted(angles, (levels[1:] + levels[:-1]) / 2)
        at = np.concatenate([[0], borders, [GRID]])
        levels = np.diff(moment[at]) / np.diff(below[at])
    return torch.tensor(levels, dtype=torch.float32)


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
