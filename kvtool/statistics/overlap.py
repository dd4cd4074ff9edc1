"""Whether layers look at the same entries, per KV head: what a layer would see that reads what another one chose.

    w_j = weights of layer j over the entries that come before the rows looked at, sinks aside: softmax, mean of a group
    T_j = the SHARE of them with the largest w_j
    overlap[i, j] = Σ |T_i ∩ T_j| / |T_j|        mass[i, j] = Σ Σ_{t ∈ T_i} w_j(t),        i ≤ j

Sums over rows, means over KV heads (TidalDecode's position persistence, arXiv 2410.05076; its released code compares
query heads). The first `SINK` entries are read whatever is chosen, and would hide the rest. Rows looked at are the last
`ROWS` of each text, of its second half at most. Layers with a sliding window of their own are left out. It knows of no
choice that several layers make together.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic

ROWS, SINK, SHARE = 32, 4, 0.05


class Overlap(Statistic):
    default = False

    def zero(self) -> None:
        self.add("overlap", self.geometry.layers, self.geometry.layers)
        self.add("mass", self.geometry.layers, self.geometry.layers)
        self.add("rows", 1)
        self.chosen: dict[int, torch.Tensor] = {}  # what each layer of this text chose, int64 [K,R,N]

    def states(self, view: States) -> None:
        first = max(view.k.shape[1] - ROWS, view.k.shape[1] // 2)
        if first <= SINK:
            return
        if view.layer == 0:
            self.chosen = {}
            self["rows"] += view.k.shape[1] - first
        if self.geometry.windows[view.layer] is None:
            self._compare(view.layer, seen(view, first))
        if view.layer == self.geometry.layers - 1:
            self.chosen = {}

    def _compare(self, layer: int, weights: torch.Tensor) -> None:
        """weights [K,R,S] of this layer."""
        best = weights.topk(max(1, round(SHARE * weights.shape[2])), dim=2).indices
        self.chosen[layer] = best
        own = torch.zeros_like(weights).scatter(2, best, 1.0)
        for other, index in self.chosen.items():
            self["overlap"][other, layer] += own.gather(2, index).double().sum((1, 2)).mean() / best.shape[2]
            self["mass"][other, layer] += weights.gather(2, index).double().sum((1, 2)).mean()


def seen(view: States, first: int) -> torch.Tensor:
    """The rows from `first` on over the entries SINK … first − 1, [K,R,S]; what they pay the others is left out."""
    q = view.q[:, first:].float().unflatten(0, (len(view.k), -1))
    logits = view.scale * q @ view.k[:, None, SINK:first].float().mT
    if view.softcap is not None:
        logits = view.softcap * torch.tanh(logits / view.softcap)
    return logits.softmax(-1).mean(1)
