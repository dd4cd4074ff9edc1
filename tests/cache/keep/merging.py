"""What tests of merging, picks and budgets share: a view of random entries, and a job that merges them."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvtool.cache.keep.merges._base import Job
from kvtool.cache.keep.scores._base import View
from kvtool.slots import Select

B, K, G, S, D = 2, 3, 2, 24, 8


def view(seed: int = 0, entries: int = S, layer: int = 0, rows: int = B, **options) -> View:
    draw = torch.Generator().manual_seed(seed)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, entries, D, generator=draw)

    q, k, v = random(K * G), random(K), random(K)
    spec = Select(torch.full((4, K), 0.5), observe="all", reduce="sum", **options)
    return View(q, torch.arange(entries), k, v, D**-0.5, None, spec, layer, list(range(K)))


def job(entries: View, kept: int, seed: int = 0, **memory) -> Job:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(entries.k.shape[:3], generator=draw)
    index = torch.rand(entries.k.shape[:3], generator=draw).argsort(-1)[..., :kept].sort(-1).values
    return Job(replace(entries, memory=memory), scores, torch.ones(entries.k.shape[:3]), index)
