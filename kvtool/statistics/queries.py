"""Mean and second moment of queries before RoPE, per query head: what a future query may be.

Sums over tokens, the first `FIRST` of each sequence left out: `sum` [L,H,D] of q, `square` [L,H,D,D] of q qᵀ.
"""

from __future__ import annotations

from kvtool.statistics._base import States, Statistic

FIRST = 4  # tokens whose queries are unlike all others


class Queries(Statistic):
    def zero(self) -> None:
        g = self.geometry
        self.add("sum", g.layers, g.query_heads, g.head_dim)
        self.add("square", g.layers, g.query_heads, g.head_dim, g.head_dim)
        self.add("tokens", 1)

    def states(self, view: States) -> None:
        q = view.rotary.unrotate(view.q, view.table)[:, FIRST:].float()
        self["sum"][view.layer] += q.sum(1)
        self["square"][view.layer] += q.mT @ q
        if view.layer == 0:
            self["tokens"] += q.shape[1]
