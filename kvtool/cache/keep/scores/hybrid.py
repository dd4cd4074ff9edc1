"""A mixture of attention received, the entropy of the entry's own row, and how the entry moves the newest output.

    s = w_a · m(Σ_i p_ij) + w_e · m(E_j) + w_g · m(‖∂ℓ/∂k_j‖₁ + ‖∂ℓ/∂v_j‖₁)      m: to 0 … 1 over the entries
    E_j = −Σ_i p_ji ln p_ji / ln t_j      of entry j's own row, if it is observed; else 0;   t_j entries that it sees
    ℓ = mean_c (o_c − o'_c)²      outputs of one query head for the newest query and the one before

With g = ∂ℓ/∂o = 2 (o − o') / D:  ∂ℓ/∂v_j = p_j g;  ∂ℓ/∂k_j = scale · p_j · g·(v_j − o) · q      (soft-capped logits:
times the derivative of the cap). Of one observed query there is no difference, and that term is 0. The terms are scaled
after they are summed over all query heads of the lane. (CRITIC: arXiv 2504.01281; partly reconstructed.) [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View, probabilities
from kvtool_kernels.precision import wide

SEES = "queries"


def score(view: View) -> torch.Tensor:
    received = torch.zeros(view.k.shape[0], view.k.shape[2], dtype=wide(view.k).dtype, device=view.k.device)
    entropy, newest = torch.zeros_like(received), None
    for rows, p in probabilities(view):
        received += p.sum((1, 2))
        own = -(p * p.clamp_min(1e-30).log()).sum(-1).mean(1) / (rows + 1).to(p.dtype).log().clamp_min(1e-30)
        entropy[:, rows] = own
        newest = p[:, :, -2:] if newest is None or p.shape[2] > 1 else torch.cat([newest[:, :, -1:], p], 2)
    assert newest is not None
    weights = view.spec.settings
    mixed = weights["attention"] * _scaled(received) + weights["entropy"] * _scaled(entropy)
    mixed = mixed + weights["gradient"] * _scaled(gradients(view, newest).sum(1))
    return mixed[:, None].expand(-1, view.q.shape[1], -1)


def gradients(view: View, p: torch.Tensor) -> torch.Tensor:
    """‖∂ℓ/∂k‖₁ + ‖∂ℓ/∂v‖₁ [B,H,S], from p [B,H,2,S] of the newest two queries; 0 for p [B,H,1,S]."""
    if p.shape[2] < 2:
        return torch.zeros_like(p[:, :, 0])
    values, q = wide(view.v), wide(view.q)[:, :, -1]
    heads = (values.shape[1], view.group)
    made = p.unflatten(1, heads).flatten(2, 3) @ values  # a group's queries together: values are not repeated
    before, now = made.unflatten(2, (-1, 2)).flatten(1, 2).unbind(2)
    slope = 2 * (now - before) / values.shape[-1]
    moved = (slope.unflatten(1, heads) @ values.mT).flatten(1, 2) - (now * slope).sum(-1, keepdim=True)
    step = torch.full_like(moved, view.scale)
    if view.softcap is not None:
        logits = view.scale * (q.unflatten(1, heads) @ wide(view.k).mT).flatten(1, 2)
        step = step * (1 - torch.tanh(logits / view.softcap).square())
    newest = p[:, :, -1]
    return newest * (slope.abs().sum(-1, keepdim=True) + (step * moved).abs() * q.abs().sum(-1, keepdim=True))


def _scaled(x: torch.Tensor) -> torch.Tensor:
    """[B,S] to 0 … 1 along entries; 0 where all are equal."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-30), 0.0)
