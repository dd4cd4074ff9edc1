"""The definition of what an index looks at, key by key; part of `reading.py`."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import torch

from kvtool.slots import Read

NOTHING = float("-inf")


class Looks:
    """Of one KV head. `queries` [G,T,D] of all rows, of which those `told` came with the prompt."""

    def __init__(self, read: Read, queries: torch.Tensor, told: list[int]):
        self.search, self.name, self.queries, self.told = read.search, read.index, queries.double(), told
        self.made = 0  # entries that the index knows
        self.links: list[dict[int, list[int]]] = []  # of each query head
        self.entries: list[int] = []  # where each one's search begins
        self.groups: list[list[int]] = []

    def masked(
        self, row: int, scores: torch.Tensor, k: torch.Tensor, count: int, upper: torch.Tensor | None
    ) -> torch.Tensor:
        """scores [G,U] of the queries of a row, `count` of which are wanted; k [S,D] as attention sees them; upper
        [C,N] of pages of pages → −inf where nobody looks."""
        if len(k) >= 2 * self.made and self.name != "pages":
            self._make(row, k)
        out = torch.full_like(scores, NOTHING)
        for g in range(len(scores)):
            if upper is not None:
                found = self._inside(upper[g if len(upper) > 1 else 0].tolist(), scores.shape[1], count)
            else:
                least = max(1, count - (len(k) - self.made))
                look = self._walk if self.name == "graph" else self._probe
                found = [*look(g, self.queries[g, row], k[: self.made], least), *range(self.made, len(k))]
            out[g, found] = scores[g, found]
        return out

    def _inside(self, upper: list[float], units: int, count: int) -> list[int]:
        coarse = self.search["coarse"]
        least = -(-count // coarse)
        taken = sorted(range(len(upper)), key=lambda page: -upper[page])
        taken = taken[: max(round(self.search["share"] * len(upper)), least)]
        return [unit for unit in range(units) if unit // coarse in taken]

    def _make(self, row: int, k: torch.Tensor) -> None:
        self.made = len(k)
        if self.name == "cluster":
            labels, count = clusters(k, self.search["entries"])
            self.groups = [[at for at, label in enumerate(labels) if label == c] for c in range(count)]
            return
        told = [at for at in self.told if at <= row]
        while len(told) > self.search["queries"]:
            told = told[::2]
        self.links, self.entries = [], []
        for queries in self.queries[:, told]:
            shared: Counter[tuple[int, int]] = Counter()
            for q in queries:
                near = (k @ q).tolist()
                best = sorted(range(len(k)), key=lambda at, near=near: -near[at])[: self.search["nearest"]]
                shared.update(permutations(best, 2))
            links: dict[int, list[int]] = {at: [] for at in range(len(k))}
            for (one, other), _ in sorted(shared.items(), key=lambda item: (-item[1], item[0][1])):
                if len(links[one]) < self.search["degree"]:
                    links[one].append(other)
            self.links.append({at: [*near, at - 1, at + 1] for at, near in links.items()})
            self.entries.append(int((k @ queries.mean(0)).argmax()))

    def _walk(self, g: int, q: torch.Tensor, k: torch.Tensor, least: int) -> list[int]:
        found = {self.entries[g]: float(k[self.entries[g]] @ q)}
        expanded: set[int] = set()
        while True:
            listed = sorted(found, key=lambda at: -found[at])[: max(self.search["ef"], least)]
            now = [at for at in listed if at not in expanded][: self.search["wide"]]
            if not now:
                return list(found)
            expanded.update(now)
            for at in now:
                found |= {near: float(k[near] @ q) for near in self.links[g][at] if 0 <= near < len(k)}

    def _probe(self, g: int, q: torch.Tensor, k: torch.Tensor, least: int) -> list[int]:
        found: list[int] = []
        filled = [group for group in self.groups if group]
        for group in sorted(filled, key=lambda group: -float(k[group].mean(0) @ q)):
            if len(found) < max(least, round(self.search["scan"] * len(k))):
                found += group
        return found


def clusters(k: torch.Tensor, unit: int) -> tuple[list[int], int]:
    """Ten rounds of k-means by cosine around the mean, begun at keys at equal distances."""
    x, count = k - k.mean(0), -(-len(k) // unit)
    centroids, labels = [x[c * len(x) // count] for c in range(count)], [0] * len(x)
    for _ in range(10):
        labels = [
            max(range(count), key=lambda c, key=key: float(key @ centroids[c] / centroids[c].norm())) for key in x
        ]
        for c in range(count):
            members = [at for at, label in enumerate(labels) if label == c]
            if members:
                centroids[c] = x[members].mean(0)
    return labels, count
