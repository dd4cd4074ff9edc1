"""How much each layer changes the residual stream: its cosine before and after attention, and the whole layer.

Sums over tokens of cos(x, x + attention) and cos(x, layer(x)); a layer whose cosine is near 1 does little
(LLM-Drop, arXiv 2406.15786).
"""

from __future__ import annotations

from kvtool.statistics._base import Statistic, Stream, cosines


class Residual(Statistic):
    def zero(self) -> None:
        self.add("attention", self.geometry.layers)
        self.add("layer", self.geometry.layers)
        self.add("tokens", 1)

    def attended(self, view: Stream) -> None:
        self["attention"][view.layer] += cosines(view.before, view.after)

    def stream(self, view: Stream) -> None:
        self["layer"][view.layer] += cosines(view.before, view.after)
        self["tokens"] += len(view.before) if view.layer == 0 else 0
