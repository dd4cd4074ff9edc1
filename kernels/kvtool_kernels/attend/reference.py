"""The definition of `attend`: softmax attention over one segment, with its log-sum-exp.

    logits[i, j] = cap(scale · q_i · k_j) + bias[i, j];   lse_i = log Σ_j exp(logits[i, j])   (natural log)
    out_i = Σ_j exp(logits[i, j] − lse_i) · v_j

`cap(x) = softcap · tanh(x / softcap)` when a soft cap is given. A query that sees no entry gets out = 0, lse = −inf,
the neutral element of `merge`. All arithmetic is fp32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvtool_kernels.precision import wide


def scored(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend` for one token, without a bias, and its `logits`."""
    return *attend(q, k, v, scale=scale, softcap=softcap), logits(q, k, scale=scale, softcap=softcap)


def ragged(
    q: torch.Tensor, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], *, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` for heads that hold different numbers of entries: q [B,H,T,D], k_i and v_i [B,K_i,S_i,D] of its KV heads
    one behind the other, Σ K_i = K → out [B,H,T,D], lse [B,H,T]."""
    return by_lane(attend, q, k, v, scale=scale, softcap=softcap)


def by_lane(
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]], q: torch.Tensor, k: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor], **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`ragged`, a call of `kernel` for each k_i and v_i."""
    group = q.shape[1] // sum(keys.shape[1] for keys in k)
    parts = q.split([group * keys.shape[1] for keys in k], 1)
    outs, lses = zip(*(kernel(*each, **options) for each in zip(parts, k, v, strict=True)), strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def logits(q: torch.Tensor, k: torch.Tensor, *, scale: float, softcap: float | None = None) -> torch.Tensor:
    """q [B,H,T,D] with k [B,K,S,D], scaled and capped, [B,H,T,S] in fp32 at least; nothing is hidden."""
    grouped = scale * wide(q).reshape(len(q), k.shape[1], -1, q.shape[-1])
    found = (grouped @ wide(k).mT).reshape(*q.shape[:3], k.shape[2])
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,T,D], k and v [B,K,S,D] with H = K·G → out [B,H,T,D] in q's dtype, lse [B,H,T] fp32.

    `causal`: query i of T sees entries up to S − T + i (the last T entries are the queries' own).
    `bias`: fp32, broadcastable to [B,H,T,S], added to the logits; −inf hides an entry.
    """
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    keys = wide(k).repeat_interleave(group, dim=1)
    values = wide(v).repeat_interleave(group, dim=1)
    logits = wide(q) @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if causal:
        entries = k.shape[2]
        hidden = torch.ones(tokens, entries, dtype=torch.bool, device=q.device).triu(entries - tokens + 1)
        logits = logits.masked_fill(hidden, float("-inf"))
    if k.shape[2] == 0:
        return q.new_zeros(batch, heads, tokens, v.shape[-1]), q.new_full(
            q.shape[:3], float("-inf"), dtype=torch.float32
        )
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return (weights @ values).to(q.dtype), lse
