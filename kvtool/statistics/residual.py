"""How much each layer changes the residual stream: its cosine before and after attention, and the whole layer.

Sums over tokens of cos(x, x + attention) and cos(x, layer(x)); a layer whose cosine is near 1 does little
(LLM-Drop, arXiv 2406.15786).
"""

from __future__ import annotations

from torch.nn.functional import cosine_similarity

from kvtool.statistics._base import Statistic, Stream


class Residual(Statistic):
    def zero(self) -> None:
        self.add("attention", self.geometry.layers)
        self.add("layer", self.geometry.layers)
        self.add("tokens", 1)

    def stream(self, view: Stream) -> None:
        self["attention"][view.layer] += cosine_similarity(view.before, view.middle, dim=-1).double().sum()
        self["layer"][view.layer] += cosine_similarity(view.before, view.after, dim=-1).double().sum()
        self["tokens"] += len(view.before) if view.layer == 0 else 0
