"""How many of the observed queries pay the entry at least what a uniform query would pay each entry it sees.

    s_j = reduce_i [p_ij ≥ 1/t_i],   t_i entries seen by query i      (Scissorhands: Liu et al., arXiv 2305.17118)

[B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View, reduced, visible

SEES = "queries"


def score(view: View) -> torch.Tensor:
    return reduced(view, ((p >= 1 / (rows[:, None] + 1).to(p.dtype)).to(p.dtype) for rows, p in visible(view)))
