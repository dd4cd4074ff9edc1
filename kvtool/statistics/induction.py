"""Echo and induction scores on a repeated random string of period R (RazorAttention, arXiv 2407.15891, section 3.2).

For every row i of copies 2, 3, …, averaged over rows:

    echo = Σ_{j < i, j ≡ i mod R} A[i, j]          induction = Σ_{same j} A[i, j + 1]

Both are sums along diagonals: distances R, 2R, … and R − 1, 2R − 1, ….
One row in R thereby also counts the sequence's very first token, so a pure sink head shows about 1/R of its sink mass.
"""

from __future__ import annotations

from kvtool.statistics._base import Rows, Statistic


class Induction(Statistic):
    corpus = "repeat"

    def zero(self) -> None:
        self.add("echo", self.geometry.layers, self.geometry.query_heads)
        self.add("induction", self.geometry.layers, self.geometry.query_heads)
        self.add("rows", 1)

    def rows(self, view: Rows) -> None:
        period = view.sample.period
        assert period is not None
        distance = view.summary.distance  # over the rows from `first`, the start of the second copy
        self["echo"][view.layer] += distance[:, period::period].double().sum(-1)
        self["induction"][view.layer] += distance[:, period - 1 :: period].double().sum(-1)
        self["rows"] += distance.shape[-1] - view.first if view.layer == 0 else 0
