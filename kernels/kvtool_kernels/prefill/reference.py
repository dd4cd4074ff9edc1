"""The definition of `streaming_prefill`: causal attention that sees the first entries and the last ones only.

    query i stands at p = start + i, entry j at j;   visible: j ≤ p and (j < sink or j > p − recent)
    logits[i, j] = cap(scale · q_i · k_j);   lse_i = log Σ_j exp(logits[i, j])
    out_i = Σ_j exp(logits[i, j] − lse_i) · v_j

`recent` counts the query's own entry. A query that sees no entry gets (0, −inf). All arithmetic is fp32.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend.reference import attend
from kvtool_kernels.bias import hiding


def streaming_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink: int,
    recent: int,
    scale: float,
    start: int = 0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,T,D] from position `start` on, k and v [B,K,S,D] from 0 on → out [B,H,T,Dv], lse [B,H,T] fp32."""
    place = start + torch.arange(q.shape[2], device=q.device)[:, None]
    entry = torch.arange(k.shape[2], device=q.device)
    visible = (entry <= place) & ((entry < sink) | (entry > place - recent))
    bias = hiding(~visible)
    return attend(q, k, v, scale=scale, bias=bias[None, None], softcap=softcap)
