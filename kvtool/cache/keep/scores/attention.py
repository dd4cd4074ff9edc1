"""Attention probability, over the observed queries that could see the entry.

    s_j = reduce_i p_ij      ("mean" over the last queries: SnapKV, arXiv 2404.14469; "sum" over all: H2O, arXiv
                              2306.14048; "mean" over probes: ZipCache, arXiv 2405.14256)

[B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View

SEES = "queries"
PAST = True


def score(view: View) -> torch.Tensor:
    return view.paid


def shift(view: View) -> tuple[torch.Tensor, ...]:
    """Nothing is added to logits."""
    return ()
