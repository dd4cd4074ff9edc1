"""Retrieval score: how often a head's strongest attention lies on the very needle token that is being copied.

For one prompt, score(h) = |copied by h ∩ needle| / |needle|: a needle token counts for a head when, in some
decode step, the head's top-1 key is that token and the step generates it (arXiv 2404.15574, section 2). The
released code adds up steps instead, so a repeated token can push a score above 1; that sum is kept as `steps`. `mass`
is the attention that a head pays to the whole needle in those steps that generate one of its tokens (CompressKV, arXiv
2508.02401, whose code counts a step again for each place where the needle holds the token; here it counts once). A
prompt counts only if more than half of the needle's tokens were generated (ROUGE-1 recall > 0.5).
"""

from __future__ import annotations

import torch

from kvtool.corpus.base import Sample
from kvtool.statistics._base import Copying, Statistic

RECALL = 0.5


class Retrieval(Statistic):
    corpus = "needle"

    def zero(self) -> None:
        self.add("score", self.geometry.layers, self.geometry.query_heads)
        self.add("steps", self.geometry.layers, self.geometry.query_heads)
        self.add("mass", self.geometry.layers, self.geometry.query_heads)
        self.add("counted", 1)
        self.add("prompts", 1)

    def begin(self, sample: Sample) -> None:
        size = (self.geometry.layers, self.geometry.query_heads, len(sample.tokens))
        self.copied, self.hits = torch.zeros(size, dtype=torch.bool), torch.zeros(size[:2])
        self.paid = torch.zeros(size[:2], dtype=torch.float64)
        self.needle = torch.zeros(len(sample.tokens), dtype=torch.bool)
        for start, stop in sample.evidence:
            self.needle[start:stop] = True

    def step(self, view: Copying) -> None:
        best = view.attention.argmax(-1)  # [L,H]
        inside = best < len(view.prompt)
        place = best.clamp_max(len(view.prompt) - 1)
        hit = inside & self.needle[place] & (view.prompt[place] == view.generated)
        self.copied.scatter_(2, place[..., None], self.copied.gather(2, place[..., None]) | hit[..., None])
        self.hits += hit
        if bool((view.prompt[self.needle] == view.generated).any()):
            self.paid += view.attention[..., : len(view.prompt)][..., self.needle].double().sum(-1)

    def end(self, sample: Sample, answer: torch.Tensor | None) -> None:
        assert sample.answer is not None
        assert answer is not None
        wanted = set(sample.answer.tolist())
        recall = len(wanted & set(answer.tolist())) / max(1, len(wanted))
        self["prompts"] += 1
        if recall > RECALL:
            self["counted"] += 1
            self["score"] += self.copied.sum(-1) / self.needle.sum()
            self["steps"] += self.hits / self.needle.sum()
            self["mass"] += self.paid
