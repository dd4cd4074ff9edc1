"""Second moments across layers: what one basis for several adjacent layers needs, besides `gram` of each.

`k_pre`, `v` [3,L,C,C]: at [d−1,l] the sum over tokens of x_l x_{l+d}ᵀ over the C = K·D channels of all KV heads, keys
before RoPE; zero where there is no layer l+d. So the moments of any 2, 3 or 4 adjacent layers are blocks of these and
of `gram`, in as many numbers as the moments of fixed groups of 4 would take: 2·3·L·C² in fp64. If the profile weighs
tokens, a pair of layers weighs one by the geometric mean of both, so that the joint moments stay positive.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic, weighted

REACH = 3  # layers ahead


class CrossGram(Statistic):
    default = False

    def zero(self) -> None:
        width = self.geometry.kv_heads * self.geometry.head_dim
        for side in ("k_pre", "v"):
            self.add(side, REACH, self.geometry.layers, width, width)
        self.add("tokens", 1)
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the layers below, the nearest last

    def states(self, view: States) -> None:
        root = None if view.weight is None else view.weight.sqrt()
        mine = tuple(weighted(x.transpose(0, 1).flatten(1).float(), root) for x in (view.k_pre, view.v))
        self.before = self.before[-REACH:] if view.layer else []
        for distance, theirs in enumerate(reversed(self.before), 1):
            for side, first, second in zip(("k_pre", "v"), theirs, mine, strict=True):
                self[side][distance - 1, view.layer - distance] += first.T @ second
        self.before.append((mine[0], mine[1]))
        self["tokens"] += view.k.shape[1] if view.layer == 0 else 0
        if view.layer == self.geometry.layers - 1:
            self.before = []


def joint(own: torch.Tensor, cross: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The moments [n·C,n·C] of layers first … first + n − 1, from `gram` [L,C,C] and this statistic [3,L,C,C]."""
    rows = []
    for row in range(first, first + count):
        blocks = []
        for column in range(first, first + count):
            low, distance = min(row, column), abs(row - column)
            block = own[row] if not distance else cross[distance - 1, low]
            blocks.append(block if row <= column else block.T)
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows)
