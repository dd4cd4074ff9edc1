"""Where attention goes: mass by distance, column sums raw and normalised, entropy, concentration.

Per query head. `distance` is attention mass by query-key distance, `columns` the column sums by key position,
both in half-octave bins (exact below 16), so the sink mass of the first S ≤ 16 tokens and the recent mass are
exact sums of bins. Normalised column sums divide by the number of rows that can see the column (ZipCache, arXiv
2405.14256, section 4.2). `covered` is the share of a sequence's mass that its top 1, 2, 5, 10, 20, 50 % of
columns hold (ZipVL's question). Entropy is in nats; normalised, it is divided by the log of the number of entries
that the row can see, so 1 is uniform.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import BINS, Rows, Statistic, binned

SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50)


class Attention(Statistic):
    def zero(self) -> None:
        layers, heads = self.geometry.layers, self.geometry.query_heads
        self.add("distance", layers, heads, BINS)
        self.add("columns", layers, heads, BINS)
        self.add("columns_normalised", layers, heads, BINS)
        self.add("columns_count", BINS)
        self.add("covered", layers, heads, len(SHARES))
        self.add("entropy", layers, heads)
        self.add("entropy_normalised", layers, heads)
        self.add("tokens", 1)
        self.add("sequences", 1)

    def rows(self, view: Rows) -> None:
        summary, layer = view.summary, view.layer
        columns = summary.columns.sum(1)
        tokens = columns.shape[-1]
        normalised = columns / torch.arange(tokens, 0, -1).clamp_max(self.geometry.windows[layer] or tokens)
        self["distance"][layer] += binned(summary.distance)
        self["columns"][layer] += binned(columns)
        self["columns_normalised"][layer] += binned(normalised)
        top = columns.sort(-1, descending=True).values.cumsum(-1) / tokens
        self["covered"][layer] += top[:, [max(0, round(share * tokens) - 1) for share in SHARES]]
        self["entropy"][layer] += summary.entropy.sum(-1)
        window = self.geometry.windows[layer] or tokens
        most = torch.log(torch.arange(1, tokens + 1).clamp_max(window).double())
        share = summary.entropy.double() / most
        share[:, most == 0] = 1.0  # one choice: as spread out as can be
        self["entropy_normalised"][layer] += share.sum(-1)
        if layer == 0:
            self["columns_count"] += binned(torch.ones(tokens))
            self["tokens"] += tokens
            self["sequences"] += 1
