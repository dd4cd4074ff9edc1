"""Choices as tensors: how heads agree on scores of units, and what a choice becomes that is kept while others are made
anew.

Shapes: B batch, K KV heads of the lane, G query heads of each, U units, C choosers per KV head (G if each query head
chooses by itself, else 1); a choice is M elements of a bulk, the last first, −1 where a chooser has fewer.
"""

from __future__ import annotations

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read import tails
from kvtool.slots import Read


def agreed(scores: torch.Tensor, spec: Read, squares: torch.Tensor | None, step: Step) -> torch.Tensor:
    """Scores [B,K,G,U] per query head → [B,K,C,U] per chooser; squares [B,K,U]: squared lengths of what stands for the
    units, where only its direction is to count."""
    if squares is not None:
        squares = squares.sum(1, keepdim=True) if spec.heads == "layer" else squares
        scores = scores / squares[:, :, None].clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    if spec.softmax:
        scores = torch.softmax(tails.capped(scores, step), -1)
    if spec.heads == "each":
        return scores
    if spec.heads == "layer":
        return scores.mean((1, 2), keepdim=True).expand(-1, scores.shape[1], -1, -1)
    if spec.heads == "max":
        return scores.amax(2, keepdim=True)
    return scores.mean(2, keepdim=True) if spec.heads == "mean" else scores.sum(2, keepdim=True)


def either(which: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Choices a where `which` bool [B,K,C], else b, filled up with −1."""
    width = max(a.shape[3], b.shape[3])
    a, b = (torch.nn.functional.pad(x, (0, width - x.shape[3]), value=-1) for x in (a, b))
    return torch.where(which[..., None], a, b)


def extended(choice: torch.Tensor, grown: range) -> torch.Tensor:
    """The elements `grown` before choice int64 [B,K,C,M]."""
    new = torch.tensor(grown, device=choice.device).flip(0)
    return torch.cat([new.expand(*choice.shape[:3], -1), choice], dim=3) if len(grown) else choice
