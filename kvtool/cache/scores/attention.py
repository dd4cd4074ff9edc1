"""Mean attention probability over the observed queries that could see the entry.

    s_j = (1/|{i: i ≥ j}|) Σ_{i ≥ j} softmax_j(scale · q_i · k)      (SnapKV's window sum, H2O's column sum, and
                                                                       ZipCache's normalisation for rows that see less)

Queries come a block at a time, so no N×S matrix is held. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.scores._base import View

BLOCK = 64  # query rows at a time


def score(view: View) -> torch.Tensor:
    batch, heads, _, _ = view.q.shape
    entries = view.k.shape[2]
    keys = view.k.float().repeat_interleave(view.group, 1).transpose(-1, -2)
    columns = torch.arange(entries, device=view.k.device)
    total = torch.zeros(batch, heads, entries, device=view.k.device)
    for low in range(0, view.q.shape[2], BLOCK):
        rows = view.rows[low : low + BLOCK]
        logits = view.scale * (view.q[:, :, low : low + BLOCK].float() @ keys)
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        logits.masked_fill_(columns > rows[:, None], float("-inf"))
        total += torch.softmax(logits, -1).sum(2)
    could = (view.rows[:, None] >= columns).sum(0).clamp_min(1)
    return total / could
