"""Seeded noise: the control that any rule must beat. The same for every row of a batch. [B,K,S] fp32."""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View

SEES = "entries"


def score(view: View) -> torch.Tensor:
    each = [torch.rand(view.k.shape[2], generator=draw, dtype=torch.float32) for draw in view.draws()]
    return torch.stack(each).expand(view.k.shape[:3]).to(view.k.device)
