"""Per-channel magnitude of keys (before and after RoPE) and values: extrema, moments, histogram.

The histogram has signed logarithmic bins, four to an octave from 2⁻¹² to 2⁸ (by exponent and leading mantissa
bits), so it needs no range fixed beforehand and merges exactly. It counts tokens; the moments weigh them if the profile
does. Bin 0 … 81 negative from large to small, 82 … 163
positive from small to large.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic, weighted

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
        for kind in KINDS:
            for head, x in enumerate(getattr(view, kind)):
                self._channels(kind, (view.layer, head), x.float(), view.weight)
        if view.layer == 0:
            self["tokens"] += view.k.shape[1]

    def _channels(self, kind: str, at: tuple[int, int], x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """x fp32 [T,D] of one layer and head, weight [T]."""
        self[f"{kind}.min"][at] = torch.minimum(self[f"{kind}.min"][at], x.amin(0).double())
        self[f"{kind}.max"][at] = torch.maximum(self[f"{kind}.max"][at], x.amax(0).double())
        self[f"{kind}.sum"][at] += weighted(x, weight).sum(0)
        self[f"{kind}.absolute"][at] += weighted(x.abs(), weight).sum(0)
        self[f"{kind}.square"][at] += weighted(x.square(), weight).sum(0)
        self[f"{kind}.histogram"][at] += histogram(x)


def histogram(x: torch.Tensor) -> torch.Tensor:
    """x fp32 [T,D] → counts int32 [D,2·HALF]."""
    bits = x.contiguous().view(torch.int32)
    shift = 23 - PER_OCTAVE.bit_length() + 1
    level = (bits & 0x7FFFFFFF).bitwise_right_shift_(shift).sub_(((127 + LOW) << (23 - shift)) - 1)
    level.clamp_(0, HALF - 1)
    level = torch.where(bits < 0, HALF - 1 - level, HALF + level)
    level += torch.arange(x.shape[1], dtype=torch.int32) * (2 * HALF)
    counts = torch.bincount(level.flatten(), minlength=x.shape[1] * 2 * HALF)
    return counts.view(-1, 2 * HALF).int()
