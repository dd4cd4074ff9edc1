"""Mean and second moment after RoPE, of queries per query head and of keys per KV head: do queries lie where keys do?

Sums over tokens: `q_sum` [L,H,D] and `q_square` [L,H,D,D] of q and q qᵀ, `k_sum` [L,K,D] and `k_square` [L,K,D,D] of
keys, each token counted once. Order is lost, and with it at which distance a query and a key meet.
"""

from __future__ import annotations

from kvtool.statistics._base import States, Statistic


class Moments(Statistic):
    default = False

    def zero(self) -> None:
        g = self.geometry
        for side, heads in (("q", g.query_heads), ("k", g.kv_heads)):
            self.add(f"{side}_sum", g.layers, heads, g.head_dim)
            self.add(f"{side}_square", g.layers, heads, g.head_dim, g.head_dim)
        self.add("tokens", 1)

    def states(self, view: States) -> None:
        for side, x in (("q", view.q.float()), ("k", view.k.float())):
            self[f"{side}_sum"][view.layer] += x.sum(1)
            self[f"{side}_square"][view.layer] += x.mT @ x
        if view.layer == 0:
            self["tokens"] += view.k.shape[1]
