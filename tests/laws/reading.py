"""The definition of what a decode step reads, entry by entry; part of `reference.py`.

One `Reading` follows one KV head through the rows. It shares nothing with the package but the plan: units are lists of
entries, scores are written out for one query and one unit at a time, and what is not read is a column of −inf.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kvtool.plan import Plan
from tests.laws.asking import Asks
from tests.laws.indexes import Looks, clusters

Posts = dict[tuple[int, int, int], tuple[list[bool], list[list[float]] | None]]


class Reading:
    """`posts`: what all layers say to one another, by layer, head and row. `tokens`: the ids of all rows."""

    def __init__(
        self, plan: Plan, layer: int, head: int, scale: float, softcap: float | None, posts: Posts, tokens: list[int]
    ):
        read, store = plan.read, plan.store
        assert read is not None
        self.spec, self.layer, self.head, self.scale, self.softcap, self.posts = (
            read,
            layer,
            head,
            scale,
            softcap,
            posts,
        )
        self.budget = float(read.budget[layer])
        self.sink = max(read.sink, 0 if store is None else store.sink)
        self.recent = max(read.recent, 0 if store is None else store.recent)
        self.looks: Looks | None = None
        self.asks: Asks | None = None
        self.block = math.lcm(read.unit * read.search.get("coarse", 1), 1 if store is None else store.block)
        self.owner = layer if read.owner is None else int(read.owner[layer])
        owners = [] if read.owner is None else read.owner.tolist()
        self.leads = any(o == layer != at and read.budget[at] != 1 for at, o in enumerate(owners))
        self.runs = Runs(read, layer, tokens)
        self.begun = False  # has a run begun since the last choice?
        self.units: list[list[int]] = []  # members, as places in the bulk
        self.clusters = 0  # of which so many are clusters
        self.known = 0  # entries that are members of units
        self.bulk: list[int] = []  # which entries stand in it
        self.choices: list[list[int]] | None = None
        self.ages: list[int] = []
        self.asked: list[torch.Tensor] = []
        self.seen = 0

    def row(self, row: int, seen: list[int], q: Any, raw: Any, held: Any, logits: Any, v: Any) -> tuple[Any, Any]:
        """q [G,D]; raw and held: keys and values [T,D] as they came and as attention sees them; logits [G,S] and
        v [S,D] of the entries seen → the same with −inf where nothing is read, and with the tail's columns."""
        self.begun |= self.runs.step(row, q.double(), raw[0].double())
        moved = max(0, len(seen) - 1 - self.sink - self.recent) // self.block * self.block
        places = range(self.sink, self.sink + moved)
        if not moved or (self.budget == 1 and not self.leads):
            return logits, v
        bulk = [seen[at] for at in places]
        keys, values = (
            [x[bulk].double() for x in pair] for pair in zip(raw, held, strict=True)
        )  # as they came, as held
        grain = self.spec.unit if self.spec.form == "page" else 1
        total, wanted = moved // grain, self.budget * moved if self.budget <= 1 else self.budget
        self.count = count = min(total, max(1, round(wanted / grain)) + self.spec.outliers)
        if count == total and not self.leads and self.owner == self.layer:
            self.choices = None
            return logits, v
        q = q.double()
        self._settle(keys, bulk)
        if self.spec.whole and len(self.runs.queries) <= self.spec.whole:
            return logits, v
        self.bulk = bulk
        scores = self._scores(keys, q) if self.spec.tail != "drop" else None
        due, ranked = self._ranking(row, keys, q, scores)
        fresh = range(self.seen, total)
        self.seen = total
        old = self.choices or [[] for _ in due]
        self.choices = [
            sorted(range(total), key=lambda at, who=who: (-ranked[who][at], at))[:count]
            if is_due
            else [*old[who], *fresh]
            for who, is_due in enumerate(due)
        ]
        self.ages = [1 if is_due else age + 1 for is_due, age in zip(due, self.ages or [0] * len(due), strict=True)]
        if count == total:
            return logits, v
        logits, v = self._seen(scores, places, grain, values[0], values[1], logits, v)
        if self.spec.positions != "original":
            assert self.asks is not None
            self.asks.placed(logits, row, q, held[0], seen, places)
        return logits, v

    def _seen(self, scores, places, grain: int, raw, held, logits, v) -> tuple[Any, Any]:
        out, extra, means = logits.clone(), [], []
        rankings = None if scores is None else self._reduced(scores)
        for g in range(len(logits)):
            assert self.choices is not None
            who = g if self.spec.heads == "each" else 0
            entries = {at * grain + j for at in self.choices[who] for j in range(grain)}
            unread = [at for at in range(len(places)) if at not in entries]
            out[g, [places.start + at for at in unread]] = float("-inf")
            if scores is None:
                continue
            left = [sum(at not in entries for at in unit) for unit in self.units]
            weight = [self._capped(s) for s in scores[g].tolist()]
            if self.spec.tail == "mean":
                share = sum(m * math.exp(w) for m, w in zip(left, weight, strict=True))
                read = sum((len(u) - m) * math.exp(w) for u, m, w in zip(self.units, left, weight, strict=True))
                mass = torch.logsumexp(out[g, [places.start + at for at in sorted(entries)]].double(), 0)
                extra.append([float(mass) + (math.log(share / read) if share else float("-inf"))])
                means = [raw.mean(0)]
            else:
                rest = sorted((u for u in range(len(left)) if left[u]), key=lambda u: -rankings[who][u])
                rest = rest[: round(self.spec.estimated * len(self.units))] if self.spec.estimated < 1 else rest
                extra.append(
                    [weight[u] + math.log(left[u]) if u in rest else float("-inf") for u in range(len(self.units))]
                )
                means = [
                    (held if u < self.clusters else raw)[unit].mean(0) if unit else torch.zeros_like(raw[0])
                    for u, unit in enumerate(self.units)
                ]
        if scores is None:
            return out, v
        return torch.cat([out, torch.tensor(extra, dtype=out.dtype)], 1), torch.cat([v, torch.stack(means).to(v.dtype)])

    # who chooses anew, and by what

    def _ranking(self, row: int, keys, q, scores) -> tuple[list[bool], list[list[float]] | None]:
        if self.owner != self.layer:
            return self.posts[self.owner, self.head, row]
        due = self._dues(row, q)
        ranked = None
        self.begun = False
        if any(due):
            if self.spec.query == "run":
                scores = self._scores(keys, torch.stack(self.runs.queries).mean(0))
            scores = self._scores(keys, q) if scores is None else scores
            if self.looks is not None:
                upper = self._upper(keys, q) if "coarse" in self.spec.search else None
                scores = self.looks.masked(row, scores, keys[1], self.count, upper)
            units = self._units(row, scores)
            if self.spec.outliers:
                agree = [_least_cosine(keys[0][unit]) for unit in self.units]
                for unit in sorted(range(len(agree)), key=agree.__getitem__)[: self.spec.outliers]:
                    units[:, unit] = float("inf")
            ranked = units.tolist()
            if self.spec.form != "page":
                owner = {at: u for u, unit in enumerate(self.units) for at in unit}
                ranked = [[line[owner[at]] for at in range(len(owner))] for line in ranked]
            each = due if len(due) > 1 else due * len(q)
            self.asked = [q[g] if each[g] else self.asked[g] for g in range(len(q))]
        self.posts[self.layer, self.head, row] = (due, ranked)
        return due, ranked

    def _dues(self, row: int, q) -> list[bool]:
        choosers = len(q) if self.spec.heads == "each" else 1
        if self.choices is None:
            due = [True] * choosers
        else:
            due = [bool(self.spec.period) and age >= self.spec.period for age in self.ages]
            if self.spec.jump is not None:
                cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(q, self.asked, strict=True)]
                mean = cosines if choosers > 1 else [sum(cosines) / len(cosines)]
                due = [d or c < self.spec.jump for d, c in zip(due, mean, strict=True)]
            due = [d or (self.spec.renew and self.begun) for d in due]
        if self.asks is not None and self.asks.due(row):
            due = [True] * choosers
        return due

    def _scores(self, keys, q) -> torch.Tensor:
        """[G,U]."""
        sides = [keys[1 if u < self.clusters or self.spec.summary == "keys" else 0] for u in range(len(self.units))]
        lines = [
            [self._score(query, k[unit]) if unit else float("-inf") for k, unit in zip(sides, self.units, strict=True)]
            for query in q
        ]
        return torch.tensor(lines, dtype=torch.float64)

    def _units(self, row: int, scores) -> torch.Tensor:
        """[C,U], by which units are chosen."""
        if self.asks is None:
            return self._reduced(scores)
        members = [[self.bulk[at] for at in unit] for unit in self.units]
        return self.asks.ranked(row, members, self._score, self._reduced)

    def _upper(self, keys, q) -> torch.Tensor:
        """[C,N] of units that are put together, where units are of several entries."""
        coarse, units = self.spec.search.get("coarse", 1), self.units
        self.units = [[e for unit in units[at : at + coarse] for e in unit] for at in range(0, len(units), coarse)]
        scores, self.units = self._scores(keys, q), units
        return self._reduced(scores)

    def _reduced(self, scores: torch.Tensor) -> torch.Tensor:
        """[C,U]."""
        if self.spec.softmax:
            scores = torch.tensor([[self._capped(s) for s in line] for line in scores.tolist()]).double().softmax(1)
        if self.spec.heads == "each":
            return scores.clone()
        return {"max": scores.amax(0), "mean": scores.mean(0), "sum": scores.sum(0)}[self.spec.heads][None].clone()

    def _capped(self, score: float) -> float:
        score = self.scale * score
        if score == float("-inf"):  # nothing there
            return score
        return score if self.softcap is None else self.softcap * math.tanh(score / self.softcap)

    def _score(self, q: torch.Tensor, k: torch.Tensor) -> float:
        """One query [D], the keys of one unit [n,D]."""
        name, rank = self.spec.summary, self.spec.rank
        if name == "minmax":
            return float(torch.maximum(q * k.amin(0), q * k.amax(0)).sum())
        if name in ("mean", "root-mean", "attended"):
            return float(q @ k.mean(0)) * (len(k) ** 0.5 if name == "root-mean" else 1)
        if name == "keys" and rank:
            top = sorted(range(len(q)), key=lambda c: -abs(float(q[c])))[:rank]
            return float((k[:, top] @ q[top]).max()) / math.sqrt(q[top].abs().sum() / q.abs().sum())
        if name == "channels":
            assert self.spec.table is not None
            order = self.spec.table[self.layer, self.head, :rank].tolist() if rank else slice(None)
            labels = k[:, order]
            if self.spec.bits:
                labels = torch.stack([_in_codes(label, 2**self.spec.bits - 1) for label in labels])
            return float((labels @ q[order]).max())
        if name == "between":
            assert self.spec.table is not None
            weight = float(self.spec.table[self.layer, self.head])
            return float(q @ (weight * k.amax(0) + (1 - weight) * k.amin(0)))
        if name == "low-rank":
            assert self.spec.table is not None
            basis = self.spec.table[self.layer, self.head, :, :rank].double()
            return float((k @ basis @ (basis.T @ q)).max())
        return float((k @ q).max())

    def _settle(self, keys, bulk: list[int]) -> None:
        """`bulk`: which of all entries stand where in it."""
        entries = len(keys[0])
        new = list(range(self.known, entries))
        self.known = entries
        if self.spec.form == "page":
            self.units += [new[at : at + self.spec.unit] for at in range(0, len(new), self.spec.unit)]
        elif self.spec.form == "run" or (self.spec.cut and self.units):
            for at in new:
                number = self.clusters + self.runs.number(bulk[at])
                self.units += [[] for _ in range(number + 1 - len(self.units))]
                self.units[number].append(at)
        elif new:
            labels, count = clusters(keys[1][new], self.spec.unit)
            self.units += [[at for at, label in zip(new, labels, strict=True) if label == c] for c in range(count)]
            self.clusters = len(self.units)


class Runs:
    """Where runs begin, by a rule that looks at one entry and the one before it."""

    def __init__(self, read, layer: int, tokens: list[int]):
        self.spec, self.tokens = read, tokens
        self.apart = 0.0 if read.apart is None else float(read.apart[layer])
        self.begins: list[int] = []
        self.looked = 0  # entries of which it is known whether they begin a run
        self.last: torch.Tensor | None = None
        self.queries: list[torch.Tensor] = []  # of the decode steps of the newest run

    def step(self, row: int, q: torch.Tensor, keys: torch.Tensor) -> bool:
        """A decode step with q [G,D]; row + 1 of keys [T,D] have come. Has a run begun since the last one?"""
        begun = len(self.begins)
        if self.spec.cut == "queries":
            if self.last is not None and sum(map(_cosine, q, self.last)) / len(q) < self.apart:
                self.begins.append(row)
            self.last = q
        elif self.spec.cut is not None:
            self.begins += [at for at in range(max(1, self.looked), row + 1) if self._begins(at, keys)]
            self.looked = row + 1
        if len(self.begins) > begun:
            self.queries = []
        self.queries.append(q)
        return len(self.begins) > begun

    def _begins(self, at: int, keys: torch.Tensor) -> bool:
        if self.spec.cut == "tokens":
            return self.tokens[at - 1] in self.spec.ends.tolist()
        return _cosine(keys[at], keys[at - 1]) < self.apart

    def number(self, entry: int) -> int:
        """Of the run that an entry belongs to."""
        return sum(begin <= entry for begin in self.begins)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def _in_codes(x: torch.Tensor, largest: int) -> torch.Tensor:
    """x [n] as it comes back from codes 0 … largest, with a scale and a zero in 16 bits."""
    low = x.float().min().half().double()
    scale = ((x.float().max() - x.float().min()) / largest).half().double()
    codes = ((x.float().double() - low) / scale).clamp(0, largest).round()
    return codes * scale + low


def _least_cosine(k: torch.Tensor) -> float:
    mean = k.mean(0)
    return min(float(key @ mean / key.norm() / mean.norm()) for key in k)
