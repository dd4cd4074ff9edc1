"""What a method's lane makes of a prompt: the kept entries after merging."""

from __future__ import annotations

import torch

from kvtool.cache.keep.budgets._base import Ballot
from kvtool.cache.keep.merges._base import Job, Merged, at
from kvtool.cache.keep.selector import Selector
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
    return merged(made.job(view, scores, torch.ones(k.shape[:3]), index)), index


def merged(job: Job) -> Merged:
    """What stays, written out where the rule says only what changes."""
    made = job.spec.rule("merge").merge(job)
    if isinstance(made, tuple):
        return made
    k, v = (at(x, job.index) for x in (job.view.k, job.view.v))
    if made is None:
        return k, v, job.counts.gather(2, job.index)
    places = made.places[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.scatter(2, places, made.k), v.scatter(2, places, made.v), made.counts


def copies(count: int, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many entries, each so many times in a row."""
    return random(1, K, count, D).repeat_interleave(times, 2), random(1, K, count, D).repeat_interleave(times, 2)
