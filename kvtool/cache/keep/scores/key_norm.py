"""Minus the norm of the key: keys of small norm draw attention (Devoto et al., arXiv 2406.11430). [B,K,S] fp32."""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool_kernels.precision import wide

SEES = "entries"


def score(view: View) -> torch.Tensor:
    return -wide(view.k).norm(dim=-1)
