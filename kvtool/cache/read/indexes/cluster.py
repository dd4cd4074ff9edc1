"""Clusters of keys: a query head looks at the entries of those whose mean keys have the largest product with it, and so
finds the best ones among a few (an inverted file, which RetrievalAttention, arXiv 2409.10516, compares itself with).

SETTINGS: "entries" of a cluster, on average; "scan": clusters are looked at until this share of the entries was, or as
many as are read. k-means as in `clusters.py`. Held: mean keys, and the cluster of every entry.
"""

from __future__ import annotations

import torch

from kvtool.cache.read.clusters import clustered, means
from kvtool.cache.read.indexes._base import Scan, products
from kvtool.cache.read.units import Units
from kvtool.slots import Read
from kvtool_kernels.precision import wide

SETTINGS = ("entries", "scan")
PAGES = False
QUERIES = False


class Found(Scan):
    held = ("labels", "sizes", "centroids")

    def __init__(self, spec: Read, units: Units):
        super().__init__(spec, units)
        self.labels: torch.Tensor | None = None  # of entries, int32 [B,K,S]
        self.sizes: torch.Tensor | None = None  # of clusters, int32 [B,K,N]
        self.centroids: torch.Tensor | None = None  # [B,K,N,D]

    def make(self, k: torch.Tensor) -> bool:
        self.labels, self.sizes = clustered(k, self.search["entries"])
        self.centroids = means(k, self.labels, self.sizes)
        return True

    def walk(self, q: torch.Tensor, k: torch.Tensor, count: int) -> torch.Tensor:
        assert self.labels is not None
        assert self.sizes is not None
        assert self.centroids is not None
        wanted = min(max(count, round(self.search["scan"] * k.shape[2])), k.shape[2])
        near = (wide(q) @ wide(self.centroids).mT).masked_fill(self.sizes[:, :, None] == 0, float("-inf"))
        order = near.argsort(dim=-1, descending=True, stable=True)
        sizes = self.sizes.long()[:, :, None].expand_as(order).gather(3, order)
        before = sizes.cumsum(3) - sizes
        taken = torch.zeros_like(order, dtype=torch.bool).scatter(3, order, before < wanted)
        labels = self.labels.long()[:, :, None].expand(*order.shape[:3], -1)
        at = taken.gather(3, labels).nonzero(as_tuple=True)
        found = wide(q).new_full((*q.shape[:3], k.shape[2]), float("-inf"))
        found[at] = products(q, k, at)
        return found

    def walked_bytes(self) -> int:
        return sum(held.nbytes for held in self.buffers())
