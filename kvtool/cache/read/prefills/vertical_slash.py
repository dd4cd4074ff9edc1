"""Columns and diagonals that the last queries of the chunk attend to, half of the budget each.

    a_j = Σ_i p_ij,   d_n = Σ_i p_{i,i−n}   over the last `block` queries i, mean over the heads that choose together
    the best a, then the best of the rest by Σ d_{i−j} over the queries i of the block: what diagonals hit of it

(DHSA's second version, arXiv 2510.24606, after MInference, arXiv 2407.02490.) The queries of a block share their
entries: what the diagonals of any of them hit, all of them read.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import probabilities
from kvtool.cache.read.prefills._base import Job, best


class Rule:
    def __init__(self, job: Job):
        tokens, entries = job.q.shape[2], job.k.shape[2]
        rows = torch.arange(max(0, tokens - job.spec.block), tokens, device=job.q.device)
        self.columns = self.running = torch.zeros(())
        for places, p in probabilities(job.view(rows)):
            p = job.chosen_by(p)  # [B,C,n,N]
            back = (places[:, None] - torch.arange(entries, device=p.device)).clamp_min(0)  # p is 0 ahead of a query
            lines = torch.zeros_like(p).scatter_add(3, back.expand_as(p), p)
            self.columns, self.running = self.columns + p.sum(2), self.running + lines.sum(2)
        self.running = torch.nn.functional.pad(self.running.cumsum(-1), (1, 0))  # [B,C,N+1]: sums of d before each n

    def pick(self, low: int, high: int, first: int, near: int, count: int) -> torch.Tensor:
        upright = best(self.columns[..., first:near], count // 2)
        entries = torch.arange(first, near, device=upright.device)
        slanted = self.running[..., high - entries] - self.running[..., low - entries]
        slanted = slanted.scatter(-1, upright, -1.0)
        both = torch.cat([upright, best(slanted, count - count // 2)], dim=-1)
        return first + both.sort(-1).values
