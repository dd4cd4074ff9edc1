"""The definition of what a score selects, entry by entry; part of `reference.py`.

Calls of the network follow one another as the cache sees them; after each one, scores are written out for one query at
a time (`scoring.py`), and lists are sorted. It shares nothing with the package but the plan. Selections that layers
make together (spread "model") cannot be had from one pass and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kvtool.slots import Select
from tests.laws.scoring import Entry, Held, Scoring

Move = Callable[[torch.Tensor, int, int], torch.Tensor]  # a key [D], from a position, to a position

# The rules that are defined here. Others are held to definitions of their own, in tests/cache/ and tests/methods/.
DEFINED = {
    "score": {"attention", "value-attention", "above-average", "key-norm", "key-difference", "hybrid"},
    "spread": {"head", "layer", "slope"},
    "pick": {"best", "distance", "representatives", "per-query"},
    "merge": {"drop", "nearest", "neighbour"},
}


def defined(spec: Select) -> bool:
    """Are all rules that a selection names defined here?"""
    return not spec.on_trial and all(getattr(spec, stage) in rules for stage, rules in DEFINED.items())


class Selecting(Scoring):
    """One layer. q [H,T,D], k and v [K,T,D]; `calls` are (first row, rows); the prompt has `prompt` rows."""

    def __init__(
        self, spec: Select, layer: int, q: Any, k: Any, v: Any, scale: float, softcap: float | None, move: Move | None
    ):
        super().__init__(spec, layer, q, k, v, scale, softcap)
        self.move = move
        self.limits: list[int] | None = None

    def run(self, calls: list[tuple[int, int]], prompt: int, prompt_length: int) -> dict[tuple[int, int], list[Entry]]:
        """(KV head, row) → the entries that the row sees."""
        spec, seen, pending = self.spec, {}, []
        held: Held = [[] for _ in self.k]
        self.prompt = prompt_length if spec.when == "chunk" else prompt
        if spec.when == "chunk":
            self.limits = self._budgets(prompt_length)
        for first, count in calls:
            if first == prompt and spec.when != "chunk":
                held = self._evict(held, pending, at_end=True)
            if first == prompt:
                pending = []
            rows, self.fed = range(first, first + count), first + count
            for head, entries in enumerate(held):
                new = [Entry(self.k[head, row], self.v[head, row], row, row) for row in rows]
                for row in rows:
                    seen[head, row] = [replace(e) for e in [*entries, *new[: row - first + 1]]]
                entries += new
            pending += rows
            if (spec.when == "chunk" and first < prompt) or (spec.when == "step" and first >= prompt):
                held, pending = self._evict(held, pending, at_end=False), []
        return seen

    def chosen(self, prompt: int) -> dict[int, list[int]]:
        """KV head → the rows whose entries stay when the prompt is over."""
        held = [[Entry(k, v, row, row) for row, (k, v) in enumerate(zip(*s, strict=True))]
                for s in zip(self.k[:, :prompt], self.v[:, :prompt], strict=True)]  # fmt: skip
        self.prompt = prompt
        kept = self._evict(held, list(range(prompt)), at_end=True)
        return {head: [e.row for e in entries] for head, entries in enumerate(kept)}

    def _budgets(self, entries: int) -> list[int]:
        least = max(1, self.spec.minimum)
        return [max(least, round(b * entries) if b <= 1 else int(b)) for b in self.spec.budget[self.layer].tolist()]

    def _due(self, limit: int, held: int) -> int:
        if self.spec.growing:
            dealt = limit != self._budgets(self.prompt)[0]
            limit = max(1, round(limit / self.prompt * self.fed)) if dealt else self._budgets(self.fed)[0]
        spare = self.spec.slack if self.spec.slack >= 1 else round(self.spec.slack * limit)
        return max(1, limit - int(spare)) if held > limit else held

    def _evict(self, held: Held, pending: list[int], *, at_end: bool) -> Held:
        spec, n = self.spec, len(held[0])
        self.at_end = at_end
        if spec.history and not at_end:
            pending = list(range(self.fed))[-spec.history :]
        self.looked = self._rows(pending)
        for entries, scores in zip(held, self._scores(held, pending), strict=True):
            for e, s in zip(entries, scores, strict=True):
                e.score = max(spec.decay * e.score, s) if spec.reduce == "max" else spec.decay * e.score + s
                if not self.looks:
                    e.score = s
        if spec.alike:
            for column in zip(*held, strict=True):
                mean = sum(e.score for e in column) / len(column)
                for e in column:
                    e.score = mean
        recent = int(spec.recent) if spec.recent >= 1 else round(spec.recent * self.prompt)
        recent = max(recent, 0 if at_end or spec.when != "step" else 1)
        sure = [[at < spec.sink or at >= len(entries) - recent for at in range(len(entries))] for entries in held]
        limits = self.limits if self.limits is not None else self._dealt(held, sure, self._budgets(n))
        if at_end and spec.when == "step":
            self.limits = limits
        if not at_end:
            limits = [self._due(limit, len(entries)) for limit, entries in zip(limits, held, strict=True)]
        upper = [self._upper(entries) for entries in held]
        return [
            self._kept(*both, limit, upper) for both, limit in zip(zip(held, sure, strict=True), limits, strict=True)
        ]

    # scores

    looks = True

    # budget

    def _dealt(self, held: Held, sure: list[list[bool]], budgets: list[int]) -> list[int]:
        spec, limits = self.spec, []
        fixed = [sum(flags) for flags in sure]
        own = [max(0, b - f) for b, f in zip(budgets, fixed, strict=True)]
        rivals = [(e.score, head, at) for head, entries in enumerate(held) for at, e in enumerate(entries)
                  if not sure[head][at]]  # fmt: skip
        best = sorted(rivals, reverse=True)[: sum(own)]
        for head, entries in enumerate(held):
            limit = budgets[head]
            if spec.spread == "slope":
                limit = fixed[head] + self._slope(own[head], len(entries), fixed[head])
            if spec.spread == "layer" and sum(own) < len(rivals):
                count = sum(owner == head for _, owner, _ in best)
                limit = max(1, fixed[head] + round(count * (1 - spec.floor)) + int(own[head] * spec.floor))
            free = sorted((max(0.0, e.score) for e, s in zip(entries, sure[head], strict=True) if not s), reverse=True)
            if spec.mass:
                mass = sum(max(0.0, e.score) for e in entries)
                counts = range(len(free) + 1)
                need = next((c for c in counts if mass - sum(free[c:]) >= spec.mass * mass), len(free))
                limit = min(limit, max(1, fixed[head] + need))
            if spec.least:
                limit = min(limit, max(1, fixed[head] + sum(s >= spec.least for s in free)))
            limits.append(limit)
        return limits

    def _slope(self, mean: int, entries: int, fixed: int) -> int:
        layers, least = len(self.spec.budget), mean // self.spec.settings["beta"]
        if entries - fixed <= mean or (self.spec.settings["flat"] and entries < 2 * mean):
            return mean
        most = min(2 * mean - least, entries - fixed)
        return most - self.layer * ((most - (2 * mean - most)) // (layers - 1))

    # what becomes of the entries

    def _upper(self, entries: list[Entry]) -> list[bool]:
        """Which entries are in the upper half of a head's scores."""
        order = sorted(range(len(entries)), key=lambda at: -entries[at].score)[: (len(entries) + 1) // 2]
        return [at in order for at in range(len(entries))]

    def _standing(self, order: list[int], limit: int, fixed: int, upper: list[list[bool]]) -> list[int]:
        """Some of the best of `order` make room for others that stand for many."""
        settings, n = self.spec.settings, len(order)
        some = round(settings["share"] * (limit - fixed))
        anchor = [number % 2 == 1 for number in range(len(upper))]
        if settings["anchor"] == "mean":
            anchor = [sum(line) >= n / 2 for line in upper]
        left = sorted(order[limit - some :])
        left.sort(key=lambda at: sum(line[at] != bit for line, bit in zip(upper, anchor, strict=True)))
        ranks = [number * max(1, len(left) // some) for number in range(some)]
        if settings["spacing"] == "linspace" and some:
            ranks = torch.linspace(0, len(left) - 1, some).round().long().tolist()
        return sorted(order[: limit - some] + [left[rank] for rank in ranks])

    def _kept(self, entries: list[Entry], sure: list[bool], limit: int, upper: list[list[bool]]) -> list[Entry]:
        if len(entries) <= limit:
            return entries
        seers = [1] * len(entries)
        if self.spec.pick == "per-query":
            seers = [max(1, sum(row >= e.row for row in self.looked)) for e in entries]
        worth = [e.score / count for e, count in zip(entries, seers, strict=True)]
        order = sorted(  # of entries that are sure to stay the newest, where there are more of them than may
            range(len(entries)), key=lambda at: (sure[at], 0.0 if sure[at] else worth[at], at), reverse=True
        )
        kept = sorted(order[:limit])
        if self.spec.pick == "representatives":
            kept = self._standing(order, limit, sum(sure), upper)
        if self.spec.pick == "distance" and not self.at_end:
            gone = len(entries) - limit
            last = max(self.spec.sink, len(entries) - max(self.spec.settings["distance"], sum(sure[self.spec.sink :])))
            first = max(self.spec.sink, last - gone)
            kept = [at for at in range(len(entries)) if not first <= at < first + gone]
        dropped = [at for at in range(len(entries)) if at not in kept]
        out = [replace(entries[at]) for at in kept]
        if self.spec.merge != "drop":
            self._merge(out, kept, [(at, entries[at]) for at in dropped])
        if self.move is not None:
            end = entries[-1].place + 1
            for at, e in enumerate(out):
                target = end - len(out) + at
                e.k, e.place = self.move(e.k, e.place, target), target
        return out

    def _merge(self, out: list[Entry], places: list[int], dropped: list[tuple[int, Entry]]) -> None:
        spec, survivors = self.spec, [replace(e) for e in out]

        def cosine(e: Entry, u: Entry) -> float:
            return float(e.k @ u.k / e.k.norm() / u.k.norm())

        owners = []
        for at, e in dropped:
            if spec.merge == "nearest":
                owners.append(max(range(len(out)), key=lambda u, e=e: cosine(e, survivors[u])))
            else:
                owners.append(min(range(len(out)), key=lambda u, at=at: abs(places[u] - at)))
        likeness = [cosine(e, survivors[u]) for (_, e), u in zip(dropped, owners, strict=True)]
        least = sum(likeness) / len(likeness) if spec.threshold is None else spec.threshold
        for u, survivor in enumerate(survivors):
            joined = [(e, c) for (_, e), o, c in zip(dropped, owners, likeness, strict=True) if o == u and c >= least]
            if not joined:
                continue
            apart = [float((e.k - survivor.k).norm()) for e, _ in joined]
            sigma = sum(d * e.number for d, (e, _) in zip(apart, joined, strict=True)) / sum(
                e.number for e, _ in joined
            )
            weights = {
                "equal": [e.number for e, _ in joined],
                "cosine": [c * e.number for e, c in joined],
                "gaussian": [
                    (math.exp(-(d**2) / 2 / sigma**2) if sigma else 1.0) * e.number
                    for d, (e, _) in zip(apart, joined, strict=True)
                ],
            }[spec.weigh]
            number = survivor.number + sum(e.number for e, _ in joined)
            divisor = number if spec.weigh == "cosine" else survivor.number + sum(weights)
            for side in ("k", "v"):
                total = survivor.number * getattr(survivor, side)
                total = total + sum(w * getattr(e, side) for w, (e, _) in zip(weights, joined, strict=True))
                setattr(out[u], side, total / divisor)
            if spec.count:
                out[u].number = number
