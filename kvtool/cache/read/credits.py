"""What entries were attended while they were recent: the credit with which they join a unit.

    credit_j = Σ over queries i with j ≤ i < j + R, and over a KV head's query heads, of softmax over (i − R, i] of
               scale · q_i · k_j'                                                     (R = `Read.recent`)

(InfLLM's measure of a block's representatives, which ActQKV, arXiv 2502.13542, goes by.) It looks at nothing but the R
entries up to a query's own, so that a prompt's cut makes no difference. Entries that came without queries have none.

Shapes: B batch, K KV heads of the lane, G query heads of each, N recent entries, T new ones, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read import tails
from kvtool_kernels.precision import wide

BLOCK = 256  # rows at a time


class Credits:
    """State is replaced, never written into. `reach`: R."""

    def __init__(self, reach: int):
        self.reach = reach
        self.sums: torch.Tensor | None = None  # of the recent entries, [B,K,N]

    def receive(self, q: torch.Tensor | None, k: torch.Tensor, recent: torch.Tensor, step: Step) -> None:
        """Entries with keys k [B,K,T,D] have come, the last of recent [B,K,N,D], and q [B,H,≤T,D] are the queries of
        the last of them."""
        new = wide(k).new_zeros(k.shape[:3])
        self.sums = new if self.sums is None else torch.cat([self.sums, new], 2)
        if q is not None and self.reach:
            self.sums = self.sums + credited(q.unflatten(1, (k.shape[1], -1)), recent, self.reach, step)

    def leave(self, count: int) -> torch.Tensor | None:
        """The credits [B,K,count] of the oldest entries, which leave; None if nothing was told when they came."""
        if self.sums is None:
            return None
        left, self.sums = self.sums[..., :count], self.sums[..., count:].clone()
        return left

    def take(self, index: torch.Tensor) -> None:
        """Of the recent entries only index int64 [B,K,N] are still there."""
        assert self.sums is not None
        self.sums = self.sums.gather(2, index)

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.sums is not None:
            yield self.sums

    def reorder(self, rows: torch.Tensor) -> None:
        self.sums = None if self.sums is None else self.sums[rows]


def credited(q: torch.Tensor, k: torch.Tensor, reach: int, step: Step) -> torch.Tensor:
    """q [B,K,G,T,D] of the last T of the entries k [B,K,N,D] → what each entry is given, [B,K,N]."""
    given, first = wide(k).new_zeros(k.shape[:3]), k.shape[2] - q.shape[3]
    for low in range(first, k.shape[2], BLOCK):
        high, left = min(low + BLOCK, k.shape[2]), max(0, low - reach + 1)
        rows = torch.arange(low, high, device=k.device)[:, None]
        columns = torch.arange(left, high, device=k.device)
        logits = wide(q[:, :, :, low - first : high - first]) @ wide(k[:, :, None, left:high]).mT
        hidden = (columns > rows) | (columns <= rows - reach)
        logits = tails.capped(logits.masked_fill(hidden, float("-inf")), step)
        given[:, :, left:high] += logits.softmax(-1).sum((2, 3))
    return given
