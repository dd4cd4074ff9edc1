"""Scored eviction, stage by stage: observe → score → pool → reduce over the group → budget → select.

A `Selector` belongs to one lane. It keeps the queries that its rule looks at until they have scored the entries held;
`scores` runs the first stages, `limits` the budget, `choose` the last one. What a layer's or the model's heads share is
decided by the caller, who sees all lanes; what becomes of the others is in `merging.py`.

Shapes as in `lane.py`; S entries held, in order. A query's place among them is counted from the end, since what was
evicted stood before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool import registry
from kvtool.cache.lane import Step
from kvtool.cache.scores._base import View
from kvtool.slots import Select

PROBED = 0.05  # share of the newest queries, and of the others, that "probes" looks at (ZipCache, section 4.2)


class Selector:
    """`budget`: of each of the lane's heads, as in `Select`; `layer` and `heads` say where they are.

    `prompt_length` resolves budgets that are a share of the prompt where entries go before all of it is in.
    """

    def __init__(self, spec: Select, budget: list[float], layer: int, heads: list[int], prompt_length: int = 0):
        self.spec, self.budget, self.layer, self.heads = spec, budget, layer, heads
        self.rule = registry.module("cache/scores", spec.score, "score")
        self.prompt_length = prompt_length
        self.queries: list[torch.Tensor] = []
        self.first: list[int] = []
        self.running: torch.Tensor | None = None  # scores of the entries held, if they will be scored again
        self.turn = 0
        self.limit = 0  # entries a head may hold, once that is settled
        if self.spec.when == "chunk":
            self.limit = self.limits(self.prompt_length)[0]

    def observe(self, q: torch.Tensor, start: int) -> None:
        """Remember the queries q [B,H,T,D] at positions start … that the rule may look at."""
        if not self.rule.QUERIES:
            q, start = q[:, :, :0], start + q.shape[2]
        elif self.spec.observe == "last":
            q, start = q[:, :, -self.spec.observed :], start + max(0, q.shape[2] - self.spec.observed)
            while self.queries and sum(x.shape[2] for x in self.queries[1:]) + q.shape[2] >= self.spec.observed:
                self.queries.pop(0)
                self.first.pop(0)
        self.queries.append(q.clone())
        self.first.append(start)

    def _observed(self, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B,H,N,D] and their places int64 [N] among so many entries, of which the last is the newest query's own."""
        q = torch.cat(self.queries, dim=2)
        rows = torch.cat([torch.arange(at, at + x.shape[2]) for at, x in zip(self.first, self.queries, strict=True)])
        rows += entries - self.first[-1] - self.queries[-1].shape[2]
        if self.spec.observe == "last":
            q, rows = q[:, :, -self.spec.observed :], rows[-self.spec.observed :]
        elif self.spec.observe == "probes" and len(rows):
            count = max(1, round(PROBED * len(rows)))
            others = torch.randperm(len(rows) - count, generator=torch.Generator().manual_seed(self.spec.seed))[:count]
            chosen = torch.cat([others.sort().values, torch.arange(len(rows) - count, len(rows))])
            q, rows = q[:, :, chosen.to(q.device)], rows[chosen]
        return q, rows.to(q.device)

    def scores(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> torch.Tensor:
        """Scores of the entries k, v [B,K,S,D] per KV head, [B,K,S], old scores included."""
        q, rows = self._observed(k.shape[2])
        view = View(q, rows, k, v, step.scale, step.softcap, self.spec, self.layer, self.heads, self.turn)
        new = self.rule.score(view)
        split = (k.shape[1], new.shape[1] // k.shape[1])
        if self.spec.group_first:
            new = self._pooled(self._grouped(new.unflatten(1, split)))
        else:
            new = self._grouped(self._pooled(new).unflatten(1, split))
        if self.running is not None and self.rule.QUERIES:
            old = torch.nn.functional.pad(self.spec.decay * self.running, (0, k.shape[2] - self.running.shape[2]))
            new = torch.maximum(old, new) if self.spec.reduce == "max" else old + new
        return new.mean(1, keepdim=True).expand_as(new) if self.spec.alike else new

    def _grouped(self, scores: torch.Tensor) -> torch.Tensor:
        """[B,K,G,S] → [B,K,S]."""
        how = self.spec.group
        return scores.amax(2) if how == "max" else scores.mean(2) if how == "mean" else scores.sum(2)

    def _pooled(self, scores: torch.Tensor) -> torch.Tensor:
        size = self.spec.kernel
        if self.spec.pool == "none" or size == 1:
            return scores
        pool = torch.nn.functional.avg_pool1d if self.spec.pool == "mean" else torch.nn.functional.max_pool1d
        return pool(scores, size, 1, size // 2)

    def free(self, entries: int) -> slice:
        """The entries, of so many, that do not stay whatever they score; at decode steps the newest always stays."""
        recent = max(self.spec.recent, int(self.spec.when == "step" and self.running is not None))
        low = min(self.spec.sink, entries)
        return slice(low, max(low, entries - recent))

    def limits(self, entries: int) -> list[int]:
        """Entries that each head may hold after a prompt of so many."""
        return [max(1, round(b * entries)) if b <= 1 else int(b) for b in self.budget]

    def choose(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """What always stays, and the best of scores [B,K,S]: `count` entries, in order, int64 [B,K,count]. Ties go to
        the newer entry."""
        free, scores = self.free(scores.shape[2]), scores.clone()
        scores[..., : free.start] = scores[..., free.stop :] = float("inf")
        flipped = torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)[..., :count]
        return (scores.shape[2] - 1 - flipped).sort(-1).values

    def settle(self, scores: torch.Tensor, limit: int) -> None:
        """A choice is made: forget the queries, and remember what the next one needs of scores [B,K,N] of the kept."""
        self.queries, self.first = [], []
        if self.spec.when != "prefill":
            self.running, self.limit = scores.contiguous(), limit
            self.turn += 1

    def finish(self) -> None:
        """The prompt is in."""
        if self.spec.when != "step":
            self.running = None

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.queries
        if self.running is not None:
            yield self.running

    def reorder(self, rows: torch.Tensor) -> None:
        self.queries = [q[rows] for q in self.queries]
        self.running = None if self.running is None else self.running[rows]
