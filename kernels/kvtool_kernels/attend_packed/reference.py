"""The definition of `attend_packed`: decode both sides, then `attend`.

    logits[i, j] = cap(scale · q_i · k̂_j),   lse_i = log Σ_j exp(logits[i, j]),
    out_i = Σ_j exp(logits[i, j] − lse_i) · v̂_j

A coded segment lies in the past of every query, so that each query sees each entry. No entry at all gives out = 0,
lse = −inf, the neutral element of `merge`.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend.reference import attend
from kvtool_kernels.packed import Packed
from kvtool_kernels.quantize.reference import dequantize


def attend_packed(
    q: torch.Tensor,
    keys: Packed | torch.Tensor,
    values: Packed | torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,T,D], H = K·G, and S entries → out [B,H,T,Dv] in q's dtype, lse [B,H,T] fp32.

    Each side is coded or dense [B,K,S,·]; the width of the values may differ from that of the keys.
    """
    k, v = (dequantize(side) if isinstance(side, Packed) else side for side in (keys, values))
    return attend(q, k, v, scale=scale, softcap=softcap)
