"""What `merge` is tested and measured on."""

from __future__ import annotations

import torch

Partial = tuple[torch.Tensor, torch.Tensor]

# shapes of an output [B,H,T,D]; a log-sum-exp has the same less D
SHAPES = ((1, 1, 1, 1), (2, 4, 1, 64), (1, 3, 63, 40), (1, 2, 50, 128), (1, 1, 100, 7), (2, 3, 0, 64))


def inputs(
    shape: tuple[int, ...], parts: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> list[Partial]:
    """`parts` partial results; every third row of each is empty, (0, −inf), and log-sum-exps spread over hundreds."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for part in range(parts):
        out = torch.randn(shape, generator=draw)
        lse = 100 * torch.randn(shape[:-1], generator=draw)
        empty = (torch.arange(lse.numel()).reshape(lse.shape) + part) % 3 == 0
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))
        made.append((out.to(device, dtype), lse.to(device)))
    return made
