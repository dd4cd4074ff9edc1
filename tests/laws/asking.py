"""The definition of what chooses what a decode step reads, and where that is met; part of `reading.py`.

Where the query is not the step's own, keys are compared before RoPE or by direction, all heads of a layer choose
together, or what is read stands elsewhere: written out for one row, one head and one unit at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Move = Callable[[torch.Tensor, list[int], list[int] | None], torch.Tensor]


def needed(read: Any) -> bool:
    other = read.query in ("together", "probe") or read.heads == "layer" or read.summary == "attended"
    return other or read.bare or read.cosine or read.positions != "original"


class Asks:
    """`query` [H,T,D], `key` [K,T,D] of a layer; `move(x [n,D], from, to)` turns them, None: to before RoPE; `alone`:
    is a row a decode step?"""

    def __init__(
        self, read: Any, layer: int, head: int, query: torch.Tensor, key: torch.Tensor, scale: float,
        softcap: float | None, alone: list[bool], strict: bool, move: Move,
    ):  # fmt: skip
        self.spec, self.layer, self.head, self.scale, self.softcap, self.move = read, layer, head, scale, softcap, move
        self.strict, self.together = strict, [not (strict or each) for each in alone]
        rows = list(range(query.shape[1]))
        self.turned = query.double(), key.double()
        if read.bare:
            query, key = (torch.stack([move(x, rows, None) for x in side]) for side in (query, key))
        self.query, self.key = query.double(), key.double()
        self.last = -1
        self.credits: dict[int, list[float]] = {}

    def due(self, row: int) -> bool:
        """Have tokens come together since this was asked?"""
        before, self.last = self.last, row
        return self.spec.query == "together" and any(self.together[before + 1 : row])

    def ranked(
        self, row: int, units: list[list[int]], score: Callable[[torch.Tensor, torch.Tensor], float],
        reduced: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """[C,U]; score(q [D], k [n,D]): what a query makes of the keys of a unit."""
        heads = range(len(self.key)) if self.spec.heads == "layer" else [self.head]
        group, asked = len(self.query) // len(self.key), self._asked(row)
        own = [(head, h) for head in heads for h in range(head * group, (head + 1) * group)]
        keys = {head: [self._keys(head, unit) for unit in units] for head in heads}
        scores = torch.tensor([[score(asked[h], k) for k in keys[head]] for head, h in own]).double()
        if self.spec.cosine:
            squares = [[float(k.mean(0).square().sum()) for k in keys[head]] for head in heads]
            scores = scores / torch.tensor(squares).double().sum(0).sqrt()
        return scores.mean(0, keepdim=True) if self.spec.heads == "layer" else reduced(scores)

    def _keys(self, head: int, unit: list[int]) -> torch.Tensor:
        """The keys of a unit that count."""
        if self.spec.summary == "attended":
            unit = sorted(unit, key=lambda entry: -self._credit(head)[entry])[: self.spec.rank or None]
        return self.key[head, unit]

    def _credit(self, head: int) -> list[float]:
        if head not in self.credits:
            queries, keys = self.turned
            group, reach, given = len(queries) // len(keys), self.spec.recent, [0.0] * keys.shape[1]
            for row in range(keys.shape[1]):
                near = range(max(0, row - reach + 1), row + 1)
                for h in range(head * group, (head + 1) * group):
                    logits = [self._capped(float(queries[h, row] @ keys[head, j])) for j in near]
                    most = max(logits)
                    total = sum(math.exp(x - most) for x in logits)
                    for j, x in zip(near, logits, strict=True):
                        given[j] += math.exp(x - most) / total
            self.credits[head] = given
        return self.credits[head]

    def _capped(self, product: float) -> float:
        logit = self.scale * product
        return logit if self.softcap is None else self.softcap * math.tanh(logit / self.softcap)

    def _asked(self, row: int) -> torch.Tensor:
        """What each query head asks, [H,D]."""
        newest = range(max(0, row - self.spec.asked + 1), row + 1)
        if self.spec.query == "probe":
            flat = self.query[:, : row + 1].transpose(0, 1).flatten(1)
            mean, variance = flat.mean(0), flat.var(0, unbiased=False)
            if self.spec.usual is not None:
                mean, variance = self.spec.usual[self.layer].double().flatten(0, 1).transpose(0, 1).flatten(1)
            phi = [float(((flat[r] - mean) ** 2 / (variance + variance.mean() / 100)).mean()) for r in newest]
            return sum(self.query[:, r] * (p / sum(phi)) for r, p in zip(newest, phi, strict=True))
        if self.spec.query != "together":
            return self.query[:, row]
        if not self.strict:
            end = max(r for r in range(row + 1) if self.together[r])
            first = max((r + 1 for r in range(end) if not self.together[r]), default=0)
            newest = range(max(first, end - self.spec.asked + 1), end + 1)
        return self.query[:, list(newest)].mean(1)

    def placed(
        self, logits: torch.Tensor, row: int, q: torch.Tensor, held: torch.Tensor, seen: list[int], places: range
    ) -> None:
        """Logits [G,S] of a row that reads some of the bulk's `places` among the entries `seen`, and all before them,
        where these stand."""
        for g in range(len(logits)):
            read = [at for at in places if logits[g, at] > float("-inf")]
            far = self.spec.positions == "far"
            gap = len(places) - len(read)
            target = [at + gap for at in range(places.start)] + [places.stop - len(read) + i for i in range(len(read))]
            entries = [*range(places.start), *read]
            stood = [seen[at] for at in entries]
            keys = self.move(held[stood], stood, [0] * len(entries) if far else target).double()
            query = self.move(q[g, None], [row], [self.spec.recent if far else row]).double()[0]
            logits[g, entries] = torch.tensor([self._capped(float(x)) for x in keys @ query]).to(logits.dtype)
