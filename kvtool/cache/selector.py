"""Scored eviction, stage by stage: observe → score → pool → reduce over the group → budget → select → merge.

A `Selector` belongs to one lane. It keeps the queries that its rule looks at while the prompt comes in; `scores` runs
the first stages, `counts` the budget, `choose` the last ones. What a layer's or the model's heads share is decided by
the caller, who sees all lanes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool import registry
from kvtool.cache.lane import Step
from kvtool.cache.scores._base import View
from kvtool.cache.segments import Dense
from kvtool.slots import Select

PROBED = 0.05  # share of the newest queries, and of the others, that "probes" looks at (ZipCache, section 4.2)


class Selector:
    """`budget`: of each of the lane's heads, as in `Select`."""

    def __init__(self, spec: Select, budget: list[float]):
        self.spec, self.budget = spec, budget
        self.rule = registry.module("cache/scores", spec.score, "score")
        self.queries: list[torch.Tensor] = []
        self.first: list[int] = []
        self.running: torch.Tensor | None = None  # scores of the entries held, for eviction at every step
        self.limit = 0  # entries a head may hold then

    def observe(self, q: torch.Tensor, start: int) -> None:
        """Remember the queries q [B,H,T,D] at positions start … that the rule may look at."""
        if self.spec.observe == "last":
            q, start = q[:, :, -self.spec.observed :], start + max(0, q.shape[2] - self.spec.observed)
            while self.queries and sum(x.shape[2] for x in self.queries[1:]) + q.shape[2] >= self.spec.observed:
                self.queries.pop(0)
                self.first.pop(0)
        self.queries.append(q.clone())
        self.first.append(start)

    def _observed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B,H,N,D] and their positions int64 [N]."""
        q = torch.cat(self.queries, dim=2)
        rows = torch.cat([torch.arange(at, at + x.shape[2]) for at, x in zip(self.first, self.queries, strict=True)])
        if self.spec.observe == "last":
            q, rows = q[:, :, -self.spec.observed :], rows[-self.spec.observed :]
        elif self.spec.observe == "probes":
            count = max(1, round(PROBED * len(rows)))
            others = torch.randperm(len(rows) - count, generator=torch.Generator().manual_seed(self.spec.seed))[:count]
            chosen = torch.cat([others.sort().values, torch.arange(len(rows) - count, len(rows))])
            q, rows = q[:, :, chosen.to(q.device)], rows[chosen]
        return q, rows.to(q.device)

    def scores(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> torch.Tensor:
        """Scores of the entries k, v [B,K,S,D] per KV head, fp32 [B,K,S]; what always stays scores +inf."""
        q, rows = self._observed()
        raw = self.rule.score(View(q, rows, k, v, step.scale, step.softcap, self.spec.seed))
        entries = raw.shape[2]
        if raw.shape[1] != k.shape[1] and self.spec.group_first:
            raw = self._grouped(raw, k.shape[1])
        raw = self._pooled(raw)
        if raw.shape[1] != k.shape[1]:
            raw = self._grouped(raw, k.shape[1])
        raw = raw.clone()
        raw[..., : self.spec.sink] = float("inf")
        raw[..., max(0, entries - self.spec.recent) :] = float("inf")
        return raw

    def _grouped(self, scores: torch.Tensor, kv_heads: int) -> torch.Tensor:
        split = scores.unflatten(1, (kv_heads, -1))
        return reduced(split, self.spec.group, 2)

    def _pooled(self, scores: torch.Tensor) -> torch.Tensor:
        if self.spec.pool == "none" or self.spec.kernel == 1:
            return scores
        size, entries = self.spec.kernel, scores.shape[2]
        if self.spec.pool == "mean":
            return torch.nn.functional.avg_pool1d(scores, size, 1, size // 2)[..., :entries]
        return torch.nn.functional.max_pool1d(scores, size, 1, size // 2)[..., :entries]

    def counts(self, entries: int) -> list[int]:
        """Entries that each head may keep of `entries`."""
        return [min(entries, max(1, round(b * entries) if b <= 1 else int(b))) for b in self.budget]

    def choose(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` best of scores [B,K,S], in order: int64 [B,K,count]. Ties go to the newer entry."""
        flipped = torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)[..., :count]
        return (scores.shape[2] - 1 - flipped).sort(-1).values

    def settle(self, scores: torch.Tensor, index: torch.Tensor) -> None:
        """The prompt's choice is made: forget the queries, and remember what steps need of scores [B,K,S]."""
        self.queries, self.first = [], []
        if self.spec.when == "step":
            self.running = scores.gather(2, index).nan_to_num(posinf=0.0)
            self.limit = index.shape[2]

    def step(self, q: torch.Tensor, held: Dense, step: Step) -> None:
        """One decode step: s ← decay · s + the attention q [B,H,1,D] pays, then the lowest entries beyond the limit go.

        Decay 1 accumulates (H2O); 0 looks at the newest query alone (TOVA).
        """
        if self.running is None:
            return
        k, _ = held.recall()
        rows = torch.full((q.shape[2],), k.shape[2], device=q.device)
        paid = self._grouped(self.rule.score(View(q, rows, k, k, step.scale, step.softcap, self.spec.seed)), k.shape[1])
        known = torch.nn.functional.pad(self.running, (0, k.shape[2] - self.running.shape[2]))
        self.running = self.spec.decay * known + paid
        if k.shape[2] > self.limit:
            scores = self.running.clone()
            scores[..., : self.spec.sink] = float("inf")
            scores[..., k.shape[2] - max(1, self.spec.recent) :] = float("inf")
            index = self.choose(scores, self.limit)
            held.take(index)
            self.running = self.running.gather(2, index)

    def clear(self) -> None:
        self.queries, self.first = [], []
        self.running = None

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.queries
        if self.running is not None:
            yield self.running

    def reorder(self, rows: torch.Tensor) -> None:
        self.queries = [q[rows] for q in self.queries]
        self.running = None if self.running is None else self.running[rows]


def reduced(scores: torch.Tensor, how: str, axis: int) -> torch.Tensor:
    """The GQA group's query heads, on `axis`, become one score: "mean", "max" or "sum"."""
    return scores.amax(axis) if how == "max" else scores.mean(axis) if how == "mean" else scores.sum(axis)


def merged(
    k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept entries k, v [B,K,N,D] at index int64 [B,K,N] of [B,K,S,D], each averaged with the dropped entries whose keys
    are nearest to its own (largest cosine, at least `threshold`); the others are gone."""
    full = index[..., None].expand(-1, -1, -1, k.shape[-1])
    kept_k, kept_v = k.gather(2, full).float(), v.gather(2, full).float()
    dropped = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device).scatter(2, index, False)
    unit = torch.nn.functional.normalize
    cosine = unit(k.float(), dim=-1) @ unit(kept_k, dim=-1).transpose(-1, -2)  # [B,K,S,N]
    best, owner = cosine.max(-1)
    joins = (dropped & (best >= threshold)).float()[..., None]
    target = owner[..., None].expand(-1, -1, -1, k.shape[-1])
    count = torch.ones_like(kept_k).scatter_add(2, target, joins.expand_as(target))
    out = [
        (kept.scatter_add(2, target, x.float() * joins) / count).to(x.dtype) for kept, x in ((kept_k, k), (kept_v, v))
    ]
    return out[0], out[1]
