"""How many directions a layer's hidden states take: the entropy of their spectrum, cut off as that of queries is.

    x = h − mean over tokens, each row divided by its norm;   λ the spectrum of xᵀx over its trace, from large to small
    E = −Σ_{i ≤ 32} λ_i ln λ_i

in nats, of the residual stream behind each layer, per text. (UNComp, arXiv 2410.03090, divides the layers of a model
into stages where E falls; see `query_entropy.py` for the formula's parts.) That the cut at 32 holds here too, that the
logarithm is not divided by that of the width, and that the stream is looked at behind a layer are inferred: released
are the stages of single models, where E falls by more than 1, and E / ln(width) could not.
"""

from __future__ import annotations

from kvtool.statistics._base import Statistic, Stream
from kvtool.statistics.query_entropy import nats


class StateEntropy(Statistic):
    default = False

    def zero(self) -> None:
        self.add("entropy", self.geometry.layers)
        self.add("sequences", 1)

    def stream(self, view: Stream) -> None:
        self["entropy"][view.layer] += nats(view.after)
        self["sequences"] += int(view.layer == 0)
