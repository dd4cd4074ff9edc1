"""How well one layer's choice of entries serves another: overlap of choices, and attention they hold, layer by layer.

    T_i = the SHARE of the entries with the largest logit of any query head of the group, in layer i, at one token
    overlap[i, j] = |T_i ∩ T_j| / |T_j|            mass[i, j] = Σ over T_i of layer j's mean weights of the group

`overlap`, `mass` [L,L] sum over tokens, for i ≤ j, means over the KV heads: head h of layer j goes by head h of layer i
(TidalDecode, arXiv 2410.05076). Tokens looked at are the last `ROWS` of each text, of its second half at most; entries
are all before them. Layers with a sliding window of their own are left out. It knows nothing of steps further on.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic

ROWS = 64
SHARE = 0.1


class LayerOverlap(Statistic):
    default = False

    def zero(self) -> None:
        for name in ("overlap", "mass"):
            self.add(name, self.geometry.layers, self.geometry.layers)
        self.add("rows", 1)
        self.below: dict[int, torch.Tensor] = {}  # what each layer of this text chose, int64 [K,R,N]

    def states(self, view: States) -> None:
        first = max(view.k.shape[1] - ROWS, view.k.shape[1] // 2)
        if view.layer == 0:
            self.below = {}
            self["rows"] += view.k.shape[1] - first if first else 0
        if first and self.geometry.windows[view.layer] is None:
            self._compare(view, first)
        if view.layer == self.geometry.layers - 1:
            self.below = {}

    def _compare(self, view: States, first: int) -> None:
        logits = view.logits(first, keys=first)
        weights = logits.softmax(-1).mean(1)
        count = max(1, round(SHARE * first))
        mine = logits.amax(1).topk(count, dim=-1).indices
        self.below[view.layer] = mine
        chosen = torch.zeros_like(weights).scatter(2, mine, 1.0 / count)
        for layer, theirs in self.below.items():
            self["overlap"][layer, view.layer] += chosen.gather(2, theirs).sum(-1).mean(0).sum()
            self["mass"][layer, view.layer] += weights.gather(2, theirs).sum(-1).mean(0).sum()
