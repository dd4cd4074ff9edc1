"""A graph of keys, built from the prompt's queries: keys that the same query is nearest to are neighbours, and a search
walks from neighbour to neighbour (RetrievalAttention, arXiv 2409.10516; the projection is RoarGraph's).

    sample of the prompt's queries of a query head → for each the `nearest` keys by q · k
    w(i, j) = queries that have both among them;     key j's neighbours: the `degree` keys with the largest w(i, j) > 0
    search: of the `ef` best keys seen so far, those that are not yet expanded, `wide` at a time, show their neighbours,
            until there are none;   it begins at the key with the largest product with the mean of the sample

Queries do not lie where keys do: neighbours among keys are no guide to what a query finds near, shared queries are.
Ours: the keys before and after a key in the text are neighbours of it too, at no cost, which makes one piece of the
graph where RoarGraph searches for links; and the sample, positions at equal distances, the same however the prompt is
cut, where the paper takes all queries. Where w is the same, the earlier key goes first.

SETTINGS: "queries" of the sample at most, "nearest", "degree", "ef", "wide". Held: the sample, and `degree` numbers of
4 bytes for every key and query head.
"""

from __future__ import annotations

import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.indexes._base import Scan, products
from kvtool.cache.read.units import Units
from kvtool.slots import Read
from kvtool_kernels.precision import wide

SETTINGS = ("queries", "nearest", "degree", "ef", "wide")
PAGES = False
QUERIES = True


class Found(Scan):
    held = ("sample", "neighbours", "entry")

    def __init__(self, spec: Read, units: Units):
        super().__init__(spec, units)
        self.sample: torch.Tensor | None = None  # [B,K,G,N,D], every `stride`-th of `fed` queries
        self.fed, self.stride = 0, 1
        self.neighbours: torch.Tensor | None = None  # int32 [B,K,G,S,degree], −1 where there are fewer
        self.entry: torch.Tensor | None = None  # int64 [B,K,G]
        self.expanded = 0  # keys whose neighbours the last search read, in all query heads

    def receive(self, q: torch.Tensor | None, k: torch.Tensor, step: Step) -> None:
        if q is None or step.decoded or (k.shape[2] == 1 and step.start > 0 and not step.strict):
            return
        first, self.fed = self.fed, self.fed + q.shape[2]
        new = q.unflatten(1, (k.shape[1], -1))[:, :, :, -first % self.stride :: self.stride]
        sample = new.clone() if self.sample is None else torch.cat([self.sample, new], 3)
        while sample.shape[3] > self.search["queries"]:
            sample, self.stride = sample[:, :, :, ::2].clone(), 2 * self.stride
        self.sample = sample

    def make(self, k: torch.Tensor) -> bool:
        if self.sample is None or not self.sample.shape[3]:  # a cache that was told no queries
            return False
        sample = self.sample.to(k.device)  # which is not where queries come if the bulk is in slow memory
        self.entry = (wide(sample).mean(3) @ wide(k).mT).argmax(-1)
        heads = [
            graph(wide(q), wide(k[row, head]), self.search["nearest"], self.search["degree"])
            for row, each in enumerate(sample) for head, group in enumerate(each) for q in group
        ]  # fmt: skip
        self.neighbours = torch.stack(heads).unflatten(0, sample.shape[:3])
        return True

    def walk(self, q: torch.Tensor, k: torch.Tensor, count: int) -> torch.Tensor:
        assert self.neighbours is not None
        assert self.entry is not None
        places = torch.cartesian_prod(*(torch.arange(size, device=q.device) for size in q.shape[:3]))
        row, head, query = places[:, :1], places[:, 1:2], places[:, 2:]
        entry, keys = self.entry[row, head, query], k.shape[2]  # [R,1], R = B·K·G
        found = wide(q).new_full((len(entry), keys), float("-inf"))
        found.scatter_(1, entry, products(q, k, (row, head, query, entry)))
        fresh = torch.zeros_like(found, dtype=torch.bool).scatter_(1, entry, True)  # seen, not yet expanded
        listed = min(max(self.search["ef"], count), keys)
        self.expanded = 0
        while True:
            best = found.topk(listed, dim=1).indices
            open_ = fresh.gather(1, best)
            first = open_.int().argsort(dim=1, descending=True, stable=True)[:, : self.search["wide"]]
            chosen, is_open = best.gather(1, first), open_.gather(1, first)
            if not bool(is_open.any()):
                return found.reshape(*q.shape[:3], keys)
            self.expanded += int(is_open.sum())
            fresh.scatter_(1, chosen, False)
            near = self.neighbours[row, head, query, chosen].long()
            near = torch.cat([near, chosen[..., None] - 1, chosen[..., None] + 1], 2)
            known = (near < 0) | (near >= keys) | ~is_open[..., None]
            near = near.clamp(0, keys - 1).flatten(1)
            new = ~known.flatten(1) & (found.gather(1, near) == float("-inf"))
            which, where = new.nonzero(as_tuple=True)
            at = near[which, where]
            found[which, at] = products(q, k, (row[which, 0], head[which, 0], query[which, 0], at))
            fresh[which, at] = True

    def walked_bytes(self) -> int:
        return 0 if self.neighbours is None else 4 * self.expanded * self.neighbours.shape[4]


def graph(q: torch.Tensor, k: torch.Tensor, nearest: int, degree: int) -> torch.Tensor:
    """Queries q [N,D] and keys k [S,D] of one head → neighbours int32 [S,degree], −1 where there are fewer."""
    keys = len(k)
    lists = (q @ k.T).topk(min(nearest, keys), dim=1).indices
    ones, others = lists[:, :, None].expand(-1, -1, lists.shape[1]), lists[:, None].expand(-1, lists.shape[1], -1)
    pairs, shared = (ones * keys + others)[ones != others].unique(return_counts=True)  # in order of one, then other
    order = shared.argsort(descending=True, stable=True)
    order = order[(pairs[order] // keys).argsort(stable=True)]
    one, other = pairs[order] // keys, pairs[order] % keys
    rank = torch.arange(len(one), device=k.device) - torch.searchsorted(one, one)
    taken = rank < degree
    neighbours = torch.full((keys, degree), -1, dtype=torch.int32, device=k.device)
    neighbours[one[taken], rank[taken]] = other[taken].int()
    return neighbours
