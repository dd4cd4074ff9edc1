"""The compensation entry: dropped entries live on as their mean, weighted by how many they are.

    k̂ = (1/N) Σ_dropped k,   v̂ = (1/N) Σ_dropped v,   logit = scale · q·k̂ + log N

RazorAttention (arXiv 2407.15891, section 3.3; the formula is quoted from memory in the method's card). Sums are fp32
at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvtool_kernels.precision import wide

Partial = tuple[torch.Tensor, torch.Tensor]


class Mean:
    """Running sums over the `count` dropped entries of K heads: key and value sums [B,K,D]."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.count = 0

    def fold(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Drop k, v [B,K,N,D]."""
        keys, values = wide(k).sum(2), wide(v).sum(2)
        self.keys = keys if self.keys is None else self.keys + keys
        self.values = values if self.values is None else self.values + values
        self.count += k.shape[2]

    def attend(self, q: torch.Tensor, scale: float, softcap: float | None) -> Partial:
        """Partial attention of q [B,H,T,D] over the one averaged entry; neutral where nothing was dropped."""
        if self.keys is None or self.values is None:
            return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
        count = torch.tensor([self.count], device=q.device)
        return _over(q, self.keys[:, :, None], self.values[:, :, None], count, scale, softcap)

    def trail(self, k: torch.Tensor, v: torch.Tensor, eligible: torch.Tensor) -> Trail:
        """What the sums would be after dropping entries 0..c of k, v [B,K,N,D], for each c; eligible bool [N]."""
        weight = eligible[:, None]
        sums = []
        for x, held in ((k, self.keys), (v, self.values)):
            running = torch.where(weight, wide(x), 0.0).cumsum(2)
            start = torch.zeros_like(running[:, :, :1]) if held is None else held[:, :, None]
            sums.append(torch.cat([start, start + running], dim=2))
        count = torch.cat([eligible.new_zeros(1, dtype=torch.long), eligible.cumsum(0)]) + self.count
        return Trail(sums[0], sums[1], count)

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.keys is not None and self.values is not None:
            yield from (self.keys, self.values)

    def reorder(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass(frozen=True)
class Trail:
    """Prefix sums over entries, one more than there are entries: keys, values [B,K,N+1,D], count [N+1]."""

    keys: torch.Tensor
    values: torch.Tensor
    count: torch.Tensor

    def attend(self, q: torch.Tensor, last: torch.Tensor, scale: float, softcap: float | None) -> Partial:
        """q [B,H,T,D]; last int64 [T]: the last entry that query has dropped (negative: none of these)."""
        index = (last + 1).clamp_min(0)
        return _over(q, self.keys[:, :, index], self.values[:, :, index], self.count[index], scale, softcap)


def _over(q, key_sum, value_sum, count, scale: float, softcap: float | None) -> Partial:
    """q [B,H,T,D] over one entry per query (or one for all): sums [B,K,T|1,D], count [T|1]."""
    batch, heads, tokens, width = q.shape
    kv_heads = key_sum.shape[1]
    safe = count.clamp_min(1)[:, None]
    grouped = wide(q).reshape(batch, kv_heads, heads // kv_heads, tokens, width)
    logit = scale * (grouped * (key_sum / safe)[:, :, None]).sum(-1)
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    lse = (logit + torch.log(count.float())).reshape(batch, heads, tokens)  # log 0 = −inf: neutral
    out = (value_sum / safe)[:, :, None].expand(batch, kv_heads, heads // kv_heads, tokens, width)
    return out.reshape(batch, heads, tokens, width).to(q.dtype), lse
