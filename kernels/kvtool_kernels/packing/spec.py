"""What `packing` is tested and measured on: every number of bits, runs of every length that a layout makes."""

from __future__ import annotations

import torch

FUNCTIONS = ("pack", "unpack", "pack_trits", "unpack_trits")
BITS = tuple(range(1, 9))
SHAPES = ((8,), (0, 16), (3, 32), (2, 1, 40), (2, 3, 5, 64), (1, 2, 7, 128))
TRITS = ((1,), (4,), (2, 5), (0, 6), (3, 64), (2, 63))


def inputs(shape: tuple[int, ...], *, kinds: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """codes 0..kinds−1, uint8 [..., n]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(kinds, shape, generator=draw, dtype=torch.uint8).to(device)
