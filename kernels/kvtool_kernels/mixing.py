"""A score of three terms, each scaled to 0 … 1 over the entries: what they are paid, how widely they looked, how they
move the output.

    s_j = w_a · m(Σ_h p_hj) + w_g · m(Σ_h ‖∂ℓ_h/∂k_j‖₁ + ‖∂ℓ_h/∂v_j‖₁) + w_e · [j is the newest] · mean_h E_h / ln S
    m(x)_j = (x_j − min x) / (max x − min x), 0 where all are equal;   E_h = −Σ_j p_hj ln p_hj
    ℓ_h = mean_c (o_hc − o'_hc)²      the output of head h now, and what it was a step before

With g = ∂ℓ/∂o = 2 (o − o') / D:  ∂ℓ/∂v_j = p_j g;  ∂ℓ/∂k_j = scale · p_j · g·(v_j − o) · q      (soft-capped logits:
times the derivative of the cap). Without an output before, that term is 0. (CRITIC: arXiv 2504.01281.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool_kernels.precision import wide


@dataclass(frozen=True)
class Mix:
    """The weights w_a, w_e, w_g, and the outputs o' [B,H,1,D], if there are any."""

    attention: float
    entropy: float
    gradient: float
    before: torch.Tensor | None = None


def mixed(
    mix: Mix, p: torch.Tensor, logits: torch.Tensor, q: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *,
    scale: float, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """p and logits [B,H,S] of the newest query q [B,H,1,D], whose output is `out`, v [B,K,S,D] → s [B,1,S]."""
    scores = mix.attention * scaled(p.sum(1))
    if mix.before is not None:
        change = moved(p, logits, q, v, wide(out), wide(mix.before), scale=scale, softcap=softcap)
        scores = scores + mix.gradient * scaled(change.sum(1))
    scores[:, -1] += mix.entropy * torch.special.entr(p).sum(-1).mean(1) / max(math.log(p.shape[-1]), 1e-30)
    return scores[:, None]


def scaled(x: torch.Tensor) -> torch.Tensor:
    """[B,S] to 0 … 1 along entries; 0 where all are equal."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-30), 0.0)


def moved(
    p: torch.Tensor, logits: torch.Tensor, q: torch.Tensor, v: torch.Tensor, now: torch.Tensor, before: torch.Tensor,
    *, scale: float, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """‖∂ℓ/∂k‖₁ + ‖∂ℓ/∂v‖₁ [B,H,S], where q, now and before are [B,H,1,D], the others as in `mixed`."""
    slope = 2 * (now - before) / v.shape[-1]
    grouped = slope[:, :, 0].unflatten(1, (v.shape[1], -1))  # a group's queries together: values are not repeated
    turned = (grouped @ wide(v).mT).flatten(1, 2) - (now * slope).sum(-1)
    step = scale if softcap is None else scale * (1 - (logits / softcap).square())
    return p * (slope.abs().sum(-1) + (step * turned).abs() * wide(q).abs().sum(-1))
