"""Cosine of each token's key and value between adjacent layers, per KV head: what depth-merging methods rely on.

`k`, `v` [L−1,K]: sums over tokens of cos(x_l, x_{l+1}) (MiniCache, arXiv 2405.14366). RoPE turns both alike, so
keys may be either side of it. Tokens are weighted if the profile weighs them.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic, cosines


class Neighbours(Statistic):
    def zero(self) -> None:
        self.add("k", max(0, self.geometry.layers - 1), self.geometry.kv_heads)
        self.add("v", max(0, self.geometry.layers - 1), self.geometry.kv_heads)
        self.add("tokens", 1)
        self.below: tuple[torch.Tensor, torch.Tensor] | None = None

    def states(self, view: States) -> None:
        if view.layer and self.below is not None:
            for name, mine, theirs in zip("kv", (view.k, view.v), self.below, strict=True):
                self[name][view.layer - 1] += cosines(mine, theirs, view.weight)
        else:
            self["tokens"] += view.k.shape[1]
        self.below = (view.k, view.v)
        if view.layer == self.geometry.layers - 1:
            self.below = None
