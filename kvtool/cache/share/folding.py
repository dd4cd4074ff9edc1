"""Rows of a batch as rows of one product, over what all of them share.

    work(q [B,K,G,…]) over something of one row = work(q folded to [1,K,B·G,…]), unfolded

Shapes: B batch, K KV heads, G query heads of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def for_all(q: torch.Tensor, rows: int, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """work(q), q [B,K,G,D] → [B,K,G,N], over something of `rows` rows: B, or one that all of q's share."""
    batch, kv_heads, group = q.shape[:3]
    if rows == batch:
        return work(q)
    made = work(q.transpose(0, 1).reshape(1, kv_heads, batch * group, -1))
    return made.reshape(kv_heads, batch, group, -1).transpose(0, 1)


def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pieces [B,K,N_i,…], or [1,K,N_i,…] if all rows share them, side by side."""
    rows = max(len(piece) for piece in pieces)
    return pieces[0] if len(pieces) == 1 else torch.cat([x.expand(rows, *x.shape[1:]) for x in pieces], 2)
