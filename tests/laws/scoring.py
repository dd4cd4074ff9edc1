"""The definition of what entries score, for one query at a time; part of `selecting.py`.

One `Entry` is one key and value of one KV head. q [H,T,D], k and v [K,T,D] of one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.slots import Select


@dataclass
class Entry:
    """row: the token it came from; place: where its key stands; number: how many entries it stands for."""

    k: torch.Tensor
    v: torch.Tensor
    row: int
    place: int
    score: float = 0.0
    number: float = 1.0


Held = list[list[Entry]]  # by KV head


class Scoring:
    """Scores of the entries held, by the queries that look at them: rows of the prompt, or of the latest call."""

    at_end: bool  # is the prompt just over?
    made: dict[int, torch.Tensor]  # query head → what the decode step before made

    def __init__(self, spec: Select, layer: int, q: Any, k: Any, v: Any, scale: float, softcap: float | None):
        self.spec, self.layer, self.q, self.k, self.v = spec, layer, q.double(), k.double(), v.double()
        self.scale, self.softcap = scale, softcap
        self.group, self.made = len(q) // len(k), {}

    def _scores(self, held: Held, pending: list[int]) -> list[list[float]]:
        spec, out = self.spec, []
        self.looks = spec.score not in ("key-norm", "key-difference")
        if spec.score == "hybrid":
            return [self._hybrid(held, self._rows(pending))] * len(held)
        for head, entries in enumerate(held):
            if self.looks:
                each = [self._reduced(head * self.group + g, entries, pending) for g in range(self.group)]
            else:
                each = [self._of_keys(entries)]
            n, half = len(entries), spec.kernel // 2

            def pool(line: list[float], n: int = n, half: int = half) -> list[float]:
                near = [line[max(0, j - half) : j + half + 1] for j in range(n)]
                if spec.pool == "none":
                    return line
                return [max(x) for x in near] if spec.pool == "max" else [sum(x) / spec.kernel for x in near]

            if spec.weights is not None:
                votes = spec.weights[self.layer].tolist()[head * self.group :]
                each = [[vote * x for x in line] for vote, line in zip(votes[: self.group], each, strict=True)]
            if not spec.group_first:
                each = [pool(line) for line in each]
            columns = list(zip(*each, strict=True))
            total = [
                {"mean": sum(column) / len(column), "max": max(column), "sum": sum(column)}[spec.group]
                for column in columns
            ]
            out.append(pool(total) if spec.group_first else total)
        return out

    def _rows(self, pending: list[int]) -> list[int]:
        if self.spec.history and not self.at_end:
            return pending
        if self.spec.observe == "last":
            share = self.spec.observed
            return pending[-(share if share >= 1 else max(1, round(share * len(pending)))) :]
        if self.spec.observe == "all":
            return pending
        count = max(1, round(0.05 * len(pending)))
        draw = torch.Generator().manual_seed(self.spec.seed)
        others = torch.randperm(len(pending) - count, generator=draw)[:count].tolist()
        return [pending[at] for at in sorted(others)] + pending[-count:]

    def _reduced(self, head: int, entries: list[Entry], pending: list[int]) -> list[float]:
        spec, paid = self.spec, [[] for _ in entries]
        for row in self._rows(pending):
            visible = [at for at, e in enumerate(entries) if e.row <= row]
            logits = [self.scale * float(self.q[head, row] @ entries[at].k) for at in visible]
            if self.softcap is not None:
                logits = [self.softcap * math.tanh(x / self.softcap) for x in logits]
            p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / spec.temperature, 0).tolist()
            for at, share in zip(visible, p, strict=True):
                if spec.score == "value-attention":
                    share *= float(entries[at].v.abs().sum())
                if spec.score == "above-average":
                    share = float(share >= 1 / len(visible))
                paid[at].append(share)
        out = []
        for line in paid:
            line = line or [0.0]
            mean = sum(line) / len(line)
            score = {"mean": mean, "sum": sum(line), "max": max(line)}[spec.reduce]
            spread = sum((x - mean) ** 2 for x in line) / max(1, len(line) - 1)
            out.append(score + spec.variance * spread)
        return out

    def _hybrid(self, held: Held, rows: list[int]) -> list[float]:
        received, entropy, moved = (torch.zeros(len(held[0]), dtype=torch.float64) for _ in range(3))
        for head in range(len(self.q)):
            entries, before = held[head // self.group], self.made.get(head)
            for row in rows:
                seen = [at for at, e in enumerate(entries) if e.row <= row]
                k = torch.stack([entries[at].k for at in seen]).requires_grad_()
                v = torch.stack([entries[at].v for at in seen]).requires_grad_()
                with torch.enable_grad():
                    logits = self.scale * k @ self.q[head, row]
                    if self.softcap is not None:
                        logits = self.softcap * torch.tanh(logits / self.softcap)
                    p = torch.softmax(logits, 0)
                    out = p @ v
                    if before is not None and row == rows[-1]:
                        (out - before).square().mean().backward()
                        moved[seen] += (k.grad.abs() + v.grad.abs()).sum(-1)
                received[seen] += p.detach()
                if len(seen) > 1:
                    own = next(at for at in seen if entries[at].row == row)
                    entropy[own] += float(torch.special.entr(p.detach()).sum()) / math.log(len(seen)) / len(self.q)
                before = out.detach()
            if not self.at_end:
                self.made[head] = before
        weights, total = self.spec.settings, torch.zeros_like(received)
        for name, x in (("attention", received), ("entropy", entropy), ("gradient", moved)):
            if len(rows) == 1 and name == "entropy":
                total += weights[name] * x  # one number that is not 0, between 0 and 1
            elif x.max() > x.min():
                total += weights[name] * (x - x.min()) / (x.max() - x.min())
        return total.tolist()

    def _of_keys(self, entries: list[Entry]) -> list[float]:
        if self.spec.score == "key-norm":
            return [-float(e.k.norm()) for e in entries]
        mean = sum(e.k / e.k.norm() for e in entries) / len(entries)
        return [-float(e.k @ mean / e.k.norm() / mean.norm()) for e in entries]
