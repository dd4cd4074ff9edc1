"""What a picking rule is given.

A rule is a file with `RAGGED`, which says whether it may choose another number of entries than it is asked for, and
`pick(choice) -> int64 [B,K,N]`: the entries that stay, in order. What always stays is among them. A ragged rule is
asked for one row at a time, and for one head, or for heads whose scores are the same (`Select.alike`). `BLIND = True`:
at decode steps it does not look at scores, which are then all 0. What makes decode steps quick, `among` or `gap`, is
told in `fused.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool.cache.keep.scores._base import View


@dataclass(frozen=True)
class Choice:
    """scores [B,K,S] of the entries in `view`, of which `count` shall stay, and whatever lies outside `free`.

    peers: scores [B,R,S] of all heads whose entries are chosen together with these, the lane's own among them. In
    the view's `memory` the merging rule may be told why entries stay.
    """

    view: View
    scores: torch.Tensor
    count: int
    free: slice
    peers: torch.Tensor


def best(scores: torch.Tensor, count: int, free: slice) -> torch.Tensor:
    """What lies outside `free`, and the best of scores [B,K,S]: `count` entries, in order, int64 [B,K,count]. Ties go
    to the newer entry."""
    scores = scores.clone()
    scores[..., : free.start] = scores[..., free.stop :] = float("inf")
    if count == scores.shape[2] - 1:
        return without(scores.argmin(-1, keepdim=True), count)  # of equal ones the first
    flipped = torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)[..., :count]
    return (scores.shape[2] - 1 - flipped).sort(-1).values


def without(gone: torch.Tensor, count: int) -> torch.Tensor:
    """All of count + 1 entries but those at gone int64 [B,K,1], in order, [B,K,count]."""
    places = torch.arange(count, device=gone.device)
    return places + (places >= gone)
