"""Per-channel magnitude of keys (before and after RoPE) and values: extrema, moments, histogram.

The histogram has signed logarithmic bins, four to an octave from 2⁻¹² to 2⁸ (by exponent and leading mantissa
bits), so it needs no range fixed beforehand and merges exactly. Bin 0 … 81 negative from large to small, 82 … 163
positive from small to large.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic

LOW, HIGH, PER_OCTAVE = -12, 8, 4
HALF = (HIGH - LOW) * PER_OCTAVE + 2  # one underflow and one overflow bin a side
KINDS = ("k_pre", "k", "v")


class Channels(Statistic):
    def zero(self) -> None:
        shape = (self.geometry.layers, self.geometry.kv_heads, self.geometry.head_dim)
        for kind in KINDS:
            self.add(f"{kind}.min", *shape, rule="min")
            self.add(f"{kind}.max", *shape, rule="max")
            self.add(f"{kind}.sum", *shape)
            self.add(f"{kind}.absolute", *shape)
            self.add(f"{kind}.square", *shape)
            self.add(f"{kind}.histogram", *shape, 2 * HALF, dtype=torch.int32)
        self.add("tokens", 1)

    def states(self, view: States) -> None:
        layer = view.layer
        for kind in KINDS:
            x = getattr(view, kind).float()
            self[f"{kind}.min"][layer] = torch.minimum(self[f"{kind}.min"][layer], x.amin(1).double())
            self[f"{kind}.max"][layer] = torch.maximum(self[f"{kind}.max"][layer], x.amax(1).double())
            self[f"{kind}.sum"][layer] += x.sum(1)
            self[f"{kind}.absolute"][layer] += x.abs().sum(1)
            self[f"{kind}.square"][layer] += x.square().sum(1)
            self[f"{kind}.histogram"][layer] += histogram(x)
        if layer == 0:
            self["tokens"] += view.k.shape[1]


def histogram(x: torch.Tensor) -> torch.Tensor:
    """x fp32 [K,T,D] → counts int32 [K,D,2·HALF]."""
    bits = x.contiguous().view(torch.int32)
    shift = 23 - PER_OCTAVE.bit_length() + 1
    level = ((bits & 0x7FFFFFFF) >> shift) - ((127 + LOW) << (23 - shift)) + 1
    level = level.clamp_(0, HALF - 1)
    level = torch.where(bits < 0, HALF - 1 - level, HALF + level)
    kv_heads, _, width = x.shape
    channel = (torch.arange(kv_heads)[:, None, None] * width + torch.arange(width)) * (2 * HALF)
    counts = torch.bincount((level + channel).flatten(), minlength=kv_heads * width * 2 * HALF)
    return counts.reshape(kv_heads, width, 2 * HALF).int()
