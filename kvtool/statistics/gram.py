"""Second-moment matrices: what low-rank methods need, without storing tokens.

`k_pre` [L,C,C] and `v` [L,C,C] over the C = K·D channels of all KV heads; `k` [L,K,D,D] after RoPE per KV head;
`q` [L,K,D,D] after RoPE, summed over the queries of each group. Sums of x xᵀ over tokens; of keys and values, weighted
if the profile weighs tokens.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic, weighted


class Gram(Statistic):
    def zero(self) -> None:
        g = self.geometry
        width = g.kv_heads * g.head_dim
        self.add("k_pre", g.layers, width, width)
        self.add("v", g.layers, width, width)
        self.add("k", g.layers, g.kv_heads, g.head_dim, g.head_dim)
        self.add("q", g.layers, g.kv_heads, g.head_dim, g.head_dim)
        self.add("tokens", 1)

    def states(self, view: States) -> None:
        layer, group, weight = view.layer, self.geometry.group, view.weight
        self["k_pre"][layer] += _outer(view.k_pre.transpose(0, 1).flatten(1), weight)
        self["v"][layer] += _outer(view.v.transpose(0, 1).flatten(1), weight)
        self["k"][layer] += _outer(view.k, weight)
        for head, queries in enumerate(view.q.split(group)):
            self["q"][layer, head] += _outer(queries).sum(0)
        self["tokens"] += view.k.shape[1] if layer == 0 else 0


def _outer(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """[..., T, C] → [..., C, C]"""
    x = x.float()
    return x.transpose(-1, -2) @ weighted(x, weight)
