"""Exact quantiles of a stream, by keeping its two tails: memory is the share outside, not the stream."""

from __future__ import annotations

import torch


class Tails:
    """The smallest and the largest numbers of each channel, over `total` numbers to come of which `outside` may lie
    beyond the quantiles, half on either side."""

    def __init__(self, total: int, outside: float):
        self.count = int(outside / 2 * total) + 1
        self.low = self.high = torch.zeros(0)

    def see(self, x: torch.Tensor) -> None:
        """x [...,T,D], T of the numbers of every channel."""
        x = x.float().cpu()
        low, high = (torch.cat([tail, x], dim=-2) if tail.numel() else x for tail in (self.low, self.high))
        count = min(self.count, low.shape[-2])
        self.low = low.topk(count, dim=-2, largest=False).values
        self.high = high.topk(count, dim=-2).values

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Half-width and middle of what lies between the quantiles, fp32 [...,D]."""
        low, high = self.low[..., -1, :], self.high[..., -1, :]
        return (high - low) / 2, (high + low) / 2
