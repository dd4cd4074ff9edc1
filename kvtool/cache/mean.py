"""The compensation entry: dropped entries live on as their mean, weighted by how many they are.

    k̂ = (1/N) Σ_dropped k,   v̂ = (1/N) Σ_dropped v,   logit = scale · q·k̂ + log N

RazorAttention (arXiv 2407.15891, section 3.3; the formula is quoted from memory in the method's card). Sums are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


class Mean:
    """Running sums over the dropped entries of K heads: key and value sums [B,K,D], counts [B]."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.count: torch.Tensor | None = None

    def _start(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None or self.count is None:
            shape = (like.shape[0], like.shape[1], like.shape[-1])
            self.keys = torch.zeros(shape, device=like.device)
            self.values = torch.zeros(shape, device=like.device)
            self.count = torch.zeros(like.shape[0], device=like.device)
        return self.keys, self.values, self.count

    def fold(self, k: torch.Tensor, v: torch.Tensor, leaving: torch.Tensor) -> None:
        """k, v [B,K,D] of one entry per row; leaving bool [B] says which rows drop theirs."""
        self.fold_many(k[:, :, None], v[:, :, None], leaving[:, None])

    def fold_many(self, k: torch.Tensor, v: torch.Tensor, dropped: torch.Tensor) -> None:
        """k, v [B,K,N,D]; dropped bool [B,N]."""
        keys, values, count = self._start(k)
        weight = dropped[:, None, :, None]
        keys += torch.where(weight, k.float(), 0.0).sum(2)
        values += torch.where(weight, v.float(), 0.0).sum(2)
        count += dropped.sum(1)

    def attend(self, q: torch.Tensor, scale: float, softcap: float | None) -> Partial:
        """Partial attention of q [B,H,T,D] over the one averaged entry; neutral where nothing was dropped."""
        keys, values, count = self._start(q[:, :: q.shape[1]])
        return _over(q, keys[:, :, None], values[:, :, None], count[:, None], scale, softcap)

    def trail(self, k: torch.Tensor, v: torch.Tensor, eligible: torch.Tensor) -> Trail:
        """What the sums would be after dropping columns 0..c of k, v [B,K,N,D], for each c; eligible bool [B,N]."""
        keys, values, count = self._start(k)
        weight = eligible[:, None, :, None]
        return Trail(
            torch.cat([keys[:, :, None], keys[:, :, None] + torch.where(weight, k.float(), 0.0).cumsum(2)], dim=2),
            torch.cat([values[:, :, None], values[:, :, None] + torch.where(weight, v.float(), 0.0).cumsum(2)], dim=2),
            torch.cat([count[:, None], count[:, None] + eligible.cumsum(1)], dim=1),
        )

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.keys is not None and self.values is not None and self.count is not None:
            yield from (self.keys, self.values, self.count)

    def reorder(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None and self.count is not None:
            self.keys, self.values, self.count = self.keys[rows], self.values[rows], self.count[rows]


@dataclass(frozen=True)
class Trail:
    """Prefix sums over columns, one more than there are columns: keys, values [B,K,N+1,D], count [B,N+1]."""

    keys: torch.Tensor
    values: torch.Tensor
    count: torch.Tensor

    def attend(self, q: torch.Tensor, last: torch.Tensor, scale: float, softcap: float | None) -> Partial:
        """q [B,H,T,D]; last int64 [T]: the last column that query has dropped (negative: none of these)."""
        index = (last + 1).clamp_min(0)
        return _over(q, self.keys[:, :, index], self.values[:, :, index], self.count[:, index], scale, softcap)


def _over(q, key_sum, value_sum, count, scale: float, softcap: float | None) -> Partial:
    """q [B,H,T,D] over one entry per query (or one for all): sums [B,K,T|1,D], count [B,T|1]."""
    batch, heads, tokens, width = q.shape
    kv_heads = key_sum.shape[1]
    safe = count.clamp_min(1)[:, None, :, None]
    grouped = q.float().reshape(batch, kv_heads, heads // kv_heads, tokens, width)
    logit = scale * (grouped * (key_sum / safe)[:, :, None]).sum(-1)
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    lse = (logit + torch.log(count.float())[:, None, None]).reshape(batch, heads, tokens)  # log 0 = −inf: neutral
    out = (value_sum / safe)[:, :, None].expand(batch, kv_heads, heads // kv_heads, tokens, width)
    return out.reshape(batch, heads, tokens, width).to(q.dtype), lse
