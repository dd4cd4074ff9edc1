"""How large a part of a query's product with a key each channel has, per KV head: what channel selection goes by.

Sums over tokens, and over the query heads of each group, [L,K,D]:

    q, k    |q_c| and |k_c| before RoPE
    qk      |q_c · k_c| of the same token, after RoPE
    pair    |q_p| · |k_p| of the same token, where p is the pair of channels that RoPE turns together: what the pair's
            part can be at any distance; both channels have the same. A channel that is not turned is alone.
"""

from __future__ import annotations

from kvtool.statistics._base import States, Statistic


class Products(Statistic):
    default = False

    def zero(self) -> None:
        g = self.geometry
        for name in ("q", "k", "qk", "pair"):
            self.add(name, g.layers, g.kv_heads, g.head_dim)
        self.add("tokens", 1)

    def states(self, view: States) -> None:
        before = view.rotary.unrotate(view.q, view.table)
        for head, k in enumerate(view.k.float()):
            group = slice(head * self.geometry.group, (head + 1) * self.geometry.group)
            at, q = (view.layer, head), view.q[group].float()
            self["q"][at] += before[group].float().abs().sum((0, 1))
            self["k"][at] += view.k_pre[head].float().abs().sum(0)
            self["qk"][at] += (q * k).abs().sum((0, 1))
            self["pair"][at] += (view.rotary.magnitude(q) * view.rotary.magnitude(k)).sum((0, 1))
        if view.layer == 0:
            self["tokens"] += view.k.shape[1]
