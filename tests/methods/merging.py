"""What a method's lane makes of a prompt: the kept entries after merging."""

from __future__ import annotations

import torch

from kvtool.cache.budgets._base import Ballot
from kvtool.cache.merges._base import Merged
from kvtool.cache.selector import Selector
from tests.methods.evicting import STEP, D, H, K, random


def thinned(
    made: Selector, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor | None = None
) -> tuple[Merged, torch.Tensor]:
    """k, v [1,K,S,D], seen by q [1,H,S,D] or by queries that look nowhere → what is held then, and the places kept."""
    q, entries = torch.zeros(1, H, k.shape[2], D) if q is None else q, k.shape[2]
    made.observe(q, 0, k, v, STEP, {})
    view = made.view(k, v, STEP, {})
    made.prompt_length = entries
    scores = made.scores(view)
    limits = made.spec.rule("spread").deal([Ballot(view, scores, made.limits(entries), made.free(entries))])[0]
    index = made.choose(view, scores, limits[0], scores)
    return made.spec.rule("merge").merge(made.job(view, scores, torch.ones(k.shape[:3]), index)), index


def copies(count: int, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many entries, each so many times in a row."""
    return random(1, K, count, D).repeat_interleave(times, 2), random(1, K, count, D).repeat_interleave(times, 2)
