"""Units of consecutive entries, by the product of what stands for their keys with the mean query of the block.

    q̄ = mean over the block's queries, and over the heads that choose together
    s(q̄, unit) = √n · q̄ · k̄ ("root-mean": DHSA, arXiv 2510.24606) or q̄ · k̄ ("mean"), k̄ the mean of the unit's n keys
    the best units, until the budget is full; of the last one its newest entries

A unit that sinks or the local window reach into is what is left of it. Means come from running sums of keys, so that a
block looks at no entry to score units.
"""

from __future__ import annotations

import torch

from kvtool import registry
from kvtool.cache.read.prefills._base import Job
from kvtool.cache.read.summaries._base import Given
from kvtool_kernels.precision import wide


class Rule:
    def __init__(self, job: Job):
        self.job = job
        self.summary = registry.module("cache/read/summaries", job.spec.summary, "summary")
        keys = wide(job.k)
        keys = keys.mean(1, keepdim=True) if job.spec.heads == "all" else keys
        self.running = torch.nn.functional.pad(keys.cumsum(2), (0, 0, 1, 0))  # [B,K|1,N+1,D]: sums before each entry

    def pick(self, low: int, high: int, first: int, near: int, count: int) -> torch.Tensor:
        begins = self.job.cuts(low, first, near).to(self.running.device)
        ends = torch.nn.functional.pad(begins[:, 1:], (0, 1), value=near)
        take = self._taken(low, high, begins, ends, count)
        entries = torch.arange(first, near, device=begins.device)
        unit = torch.searchsorted(begins, entries.expand(len(begins), -1).contiguous(), right=True) - 1
        left = ends.gather(1, unit) - entries  # entries of its unit from each one on, its own included
        unit = unit[:, None].expand(len(take), take.shape[1], -1)
        found = (left[:, None] <= take.gather(2, unit)).nonzero()[:, 2]
        return first + found.reshape(*take.shape[:2], count)

    def _taken(self, low: int, high: int, begins: torch.Tensor, ends: torch.Tensor, count: int) -> torch.Tensor:
        """How many entries of each unit [B,U] a block reads, int64 [B,C,U]."""
        start = self.job.start
        q = self.job.chosen_by(wide(self.job.q[:, :, low - start : high - start]).mean(2))
        kv_heads = self.running.shape[1]
        sizes = (ends - begins)[:, None].expand(-1, kv_heads, -1)
        sums = self._before(ends) - self._before(begins)
        parts = self.summary.pooled(sums / sizes.clamp_min(1)[..., None], sizes)
        scores = self.summary.score(q.unflatten(1, (kv_heads, -1)), parts, Given()).flatten(1, 2)
        scores = scores.masked_fill((ends == begins)[:, None], float("-inf"))
        last = scores.shape[2] - 1
        order = last - torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)  # ties: the newer one
        sizes = (ends - begins)[:, None].expand_as(order).gather(2, order)
        take = (count - (sizes.cumsum(-1) - sizes)).clamp_min(0).minimum(sizes)
        return torch.zeros_like(take).scatter(2, order, take)

    def _before(self, places: torch.Tensor) -> torch.Tensor:
        """Sums of keys before places int64 [B,U], [B,K,U,D]."""
        shape = (-1, self.running.shape[1], -1, self.running.shape[-1])
        return self.running.gather(2, places[:, None, :, None].expand(shape).expand(len(self.running), -1, -1, -1))
