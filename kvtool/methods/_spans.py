"""Runs of adjacent layers that may be written as one, and their joint second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.methods._base import Context
from kvtool.model import Geometry
from kvtool.statistics.cross_gram import joint


def spans(g: Geometry, count: int, kinds: Sequence[Any] = ()) -> list[list[int]]:
    """Runs of layers with full attention, cut into groups of `count` from the first on; where `kinds` are given, one a
    layer, those of a run have the same."""
    found: list[list[int]] = []
    run: list[int] = []
    for layer in (layer for layer in range(g.layers) if g.windows[layer] is None):
        if not run or run[-1] != layer - 1 or (kinds and kinds[layer] != kinds[run[-1]]):
            run = []
        if len(run) % count == 0:
            found.append([])
        run.append(layer)
        found[-1].append(layer)
    return found


def moments(context: Context, side: str, span: Sequence[int]) -> torch.Tensor:
    """E[zᵀz] of a span's keys before RoPE ("k_pre") or values ("v"), [n·C,n·C]."""
    own, cross = (context.seen[name] for name in ("gram", "cross-gram"))
    if not torch.equal(own["tokens"], cross["tokens"]):
        raise InputError("gram and cross-gram have seen different texts", remedy="profile both at once")
    return joint(own[side], cross[side], span[0], len(span)) / own["tokens"].clamp_min(1)
