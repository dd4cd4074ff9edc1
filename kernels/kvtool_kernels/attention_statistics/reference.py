"""The definition of `attention_statistics`, over one sequence.

    A[h,i,j] = softmax_j(cap(scale · q_i·k_j)) over j ≤ i (and j > i − window where the layer has a window)
    columns[h,c,j]  = Σ_{i in row cell c} A[h,i,j]        row cell c holds the rows with ⌊i · cells / T⌋ = c
    distance[h,δ]   = Σ_{i ≥ first} A[h,i,i−δ]
    entropy[h,i]    = −Σ_j A[h,i,j] log A[h,i,j]          (nats)
    corner[h]       = A[h,0,0]

`sink_logits[h]`, where given, takes part in the softmax with value 0: rows of A then sum to less than 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Summary(NamedTuple):
    """out [H,T,D] in q's dtype; fp32: lse [H,T], columns [H,cells,T], distance [H,T], entropy [H,T], corner [H]."""

    out: torch.Tensor
    lse: torch.Tensor
    columns: torch.Tensor
    distance: torch.Tensor
    entropy: torch.Tensor
    corner: torch.Tensor


def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cells: int = 1,
    first: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> Summary:
    """q [H,T,D], k and v [K,T,D] → Summary; T×T memory, for definition and tests."""
    group, tokens = q.shape[0] // k.shape[0], q.shape[1]
    logits = q.float() @ k.float().repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    logits = logits.masked_fill(hidden.to(q.device), float("-inf"))
    lse = torch.logsumexp(logits, -1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits[:, None].float())
    weights = torch.exp(logits - lse[..., None])
    cell = (torch.arange(tokens) * cells // tokens).to(q.device)
    columns = weights.new_zeros(q.shape[0], cells, tokens).index_add_(1, cell, weights)
    delta = (row - column).clamp_min(0).to(q.device)
    late = torch.where((row >= first).to(q.device), weights, 0.0)
    distance = weights.new_zeros(q.shape[0], tokens).scatter_add_(
        1, delta.flatten().expand(len(q), -1), late.flatten(1)
    )
    entropy = torch.special.entr(weights).sum(-1)
    out = (weights @ v.float().repeat_interleave(group, 0)).to(q.dtype)
    return Summary(out, lse, columns, distance, entropy, weights[:, 0, 0])
