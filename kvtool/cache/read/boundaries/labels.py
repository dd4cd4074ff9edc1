"""What later rows of a dense pass pay to the entries on both sides of a place.

    past_b = Σ_{i ≥ b+w} Σ_{j=b−w … b−1} A_ij,   future_b = Σ_{i ≥ b+w} Σ_{j=b … b+w−1} A_ij;   A: mean over heads
    value_b = (max(past_b, future_b) + 1e-6) / (min(past_b, future_b) + 1e-6)

(DHSA, arXiv 2510.24606, its labels.) Labels look at rows that are still to come: they are what a predictor is trained
to, and under a plan an upper bound that costs the layer a dense pass and depends on how the prompt is cut.

Rows pass a block at a time. What a column is paid by all rows, less what the 2w rows after it pay, is what later rows
pay: no sum over a T×T matrix is held, but N·2w numbers.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import probabilities
from kvtool.cache.read.prefills._base import Job

FLOOR = 1e-6


def values(job: Job) -> torch.Tensor:
    """[B,N]; −inf where a side is not whole."""
    entries, reach = job.k.shape[2], 2 * job.spec.window
    paid = torch.zeros(len(job.k), entries, dtype=torch.float64, device=job.k.device)
    near = paid.new_zeros(len(job.k), entries, reach)  # what row j + n pays column j
    for places, p in probabilities(job.view(torch.arange(job.q.shape[2], device=job.q.device))):
        p = p.mean(1).to(near.dtype)
        paid += p.sum(1)
        offset = places[:, None] - torch.arange(reach, device=p.device)  # [n,2w]: columns
        rows, back = (offset >= 0).nonzero(as_tuple=True)
        near[:, offset[rows, back], back] = p[:, rows, offset[rows, back]]
    return ratio(paid, near, job.spec.window)


def ratio(paid: torch.Tensor, near: torch.Tensor, window: int) -> torch.Tensor:
    """paid [B,N]: what columns are paid by all rows, near [B,N,2w]: by each of the 2w rows from their own on."""
    entries, early = paid.shape[1], near.cumsum(2)
    masses = []
    for side in (range(-window, 0), range(window)):  # of row b + w on, to columns b + offset
        mass = torch.zeros_like(paid)
        for offset in side:
            later = (paid - early[:, :, window - offset - 1]).clamp_min(0)
            mass += torch.roll(later, -offset, 1)
        masses.append(mass + FLOOR)
    found = torch.maximum(*masses) / torch.minimum(*masses)
    found[:, : min(window, entries)] = float("-inf")
    found[:, max(0, entries - window) :] = float("-inf")
    return found
