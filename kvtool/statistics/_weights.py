"""How much a token counts in the sums over tokens that a statistic takes: by how much attention it receives.

    c_j = Σ over query heads and rows of A[h,i,j]      (of this layer and sequence; Σ_j c_j = H·T)
    attention   w = c;      rsq   w = 1 + 2·(c − min c)/(max c − min c), from 1 to 3;      both divided by their mean

RSQ (arXiv 2503.01820) weighs the Gram matrices of weight quantisation so. Columns are not divided by the rows that can
see them, so early tokens weigh more, the first one most of all. Weights of mean 1 leave counters of tokens as they are.
"""

from __future__ import annotations

import torch

from kvtool.errors import InputError

KINDS = ("uniform", "attention", "rsq")
LOW, HIGH = 1.0, 3.0


def check(kind: str) -> str:
    """Raise InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError("unknown weight of tokens", got=kind, expected=", ".join(KINDS))
    return kind


def weights(kind: str, columns: torch.Tensor) -> torch.Tensor | None:
    """Column sums fp32 [T] → fp32 [T] of mean 1; None for uniform ones."""
    if kind == "uniform":
        return None
    if kind == "rsq":
        low, high = columns.aminmax()
        columns = LOW + (HIGH - LOW) * (columns - low) / (high - low) if high > low else torch.ones_like(columns)
    return columns / columns.mean()
