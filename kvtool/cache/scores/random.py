"""Seeded noise: the control that any rule must beat. [B,K,S] fp32."""

from __future__ import annotations

import torch

from kvtool.cache.scores._base import View


def score(view: View) -> torch.Tensor:
    draw = torch.Generator().manual_seed(view.seed)
    return torch.rand(view.k.shape[:3], generator=draw).to(view.k.device)
