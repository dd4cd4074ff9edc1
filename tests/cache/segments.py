"""What tests of segments share: numbers, tables of RoPE, a basis, and how attention over a segment is judged."""

from __future__ import annotations

import torch
from torch import nn

from kvtool.cache.lane import Step
from kvtool.cache.segments import Segment
from kvtool.encoding.transforms import Linear
from kvtool.rotary import Rotary
from kvtool_kernels.attend.reference import attend
from tests.tolerance import close

G = 3  # query heads of a KV head


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rope(nn.Module):
    """Tables of RoPE for heads of `width` channels."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.width // 2
        angles = positions[..., None] * 100.0 ** (-torch.arange(half) / half)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotary(width: int) -> Rotary:
    return Rotary(Rope(width), (torch.zeros(1, 1, dtype=torch.int64),), {}, width, interleaved=False)


def basis(heads: int, width: int, rank: int, seed: int = 0) -> Linear:
    down = torch.linalg.qr(draw(heads, width, width, seed=seed))[0][..., :rank].contiguous()
    return Linear(down, down.transpose(1, 2).contiguous(), 0.3 * draw(heads, width, seed=seed + 1))


def agree(held: Segment, q: torch.Tensor, step: Step) -> None:
    expected = attend(q, *held.recall(), **step.options)
    for actual, wanted in zip(held.attend(q, step), expected, strict=True):
        assert actual.dtype == wanted.dtype
        close(actual, wanted)
