"""Pictures of attention: each head's map pooled to 64 × 64 cells.

A cell holds the mean attention mass from its rows to its columns, so each row of cells sums to 1. Sequences of all
lengths share the grid (relative positions).
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import Rows, Statistic

CELLS = 64


class Maps(Statistic):
    cells = CELLS

    def zero(self) -> None:
        self.add("mass", self.geometry.layers, self.geometry.query_heads, CELLS, CELLS, dtype=torch.float32)
        self.add("sequences", 1)

    def rows(self, view: Rows) -> None:
        columns = view.summary.columns  # [H,cells,T]
        tokens = columns.shape[-1]
        cell = torch.arange(tokens) * CELLS // tokens
        pooled = torch.zeros(columns.shape[0], CELLS, CELLS).index_add_(2, cell, columns)
        self["mass"][view.layer] += pooled / torch.bincount(cell, minlength=CELLS).clamp_min(1)[:, None]
        self["sequences"] += view.layer == 0
