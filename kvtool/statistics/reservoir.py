"""A bounded sample of raw blocks: (q, k, v) of 64 consecutive tokens, after RoPE, the same blocks in every layer.

Blocks are drawn without replacement by the smallest of a hash of their tokens, so the sample depends on the
corpus and not on its order, and the merge of two samples is the sample of the union. `q` [N,L,H,64,D], `k` and
`v` [N,L,K,64,D], `position` [N] of each block's first token.
"""

from __future__ import annotations

import torch

from kvtool.corpus.base import Sample
from kvtool.files import digest
from kvtool.statistics._base import States, Statistic

TOKENS, BLOCKS = 64, 8
FREE = 2**62  # the priority of an empty place


class Reservoir(Statistic):
    default = False

    def zero(self) -> None:
        g = self.geometry
        self.add("q", BLOCKS, g.layers, g.query_heads, TOKENS, g.head_dim, dtype=torch.float32)
        self.add("k", BLOCKS, g.layers, g.kv_heads, TOKENS, g.head_dim, dtype=torch.float32)
        self.add("v", BLOCKS, g.layers, g.kv_heads, TOKENS, g.head_dim, dtype=torch.float32)
        self.add("position", BLOCKS, dtype=torch.int64)
        self.add("priority", BLOCKS, dtype=torch.int64)
        self["priority"].fill_(FREE)

    def begin(self, sample: Sample) -> None:
        """Decide which blocks of this sequence enter, and which places they take."""
        self.taken: list[tuple[int, int]] = []  # (place, first token)
        for start in range(0, len(sample.tokens) - TOKENS + 1, TOKENS):
            priority = int(digest(sample.tokens[: start + TOKENS]), 16) >> 2
            place = int(self["priority"].argmax())
            if priority < int(self["priority"][place]) and not bool((self["priority"] == priority).any()):
                self["priority"][place], self["position"][place] = priority, start
                self.taken = [(p, s) for p, s in self.taken if p != place] + [(place, start)]

    def states(self, view: States) -> None:
        for place, start in self.taken:
            for name in "qkv":
                self[name][place, view.layer] = getattr(view, name)[:, start : start + TOKENS]

    def end(self, sample: Sample, answer: torch.Tensor | None) -> None:
        self._sort()

    def merge(self, other: Statistic) -> None:
        everything = {name: torch.cat([self[name], other[name]]) for name in self.rules}
        order = everything["priority"].argsort(stable=True)
        again = torch.zeros(len(order), dtype=torch.bool)
        again[1:] = everything["priority"][order][1:] == everything["priority"][order][:-1]
        again &= everything["priority"][order] != FREE
        order = torch.cat([order[~again], order[again]])[:BLOCKS]
        self.state = {name: tensor[order] for name, tensor in everything.items()}

    def _sort(self) -> None:
        order = self["priority"].argsort(stable=True)
        self.state = {name: tensor[order] for name, tensor in self.state.items()}
