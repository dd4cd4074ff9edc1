"""The two sides of a replay, and the three moves: prefill, one decode step, greedy generation.

Every token after the prompt, and the prompt's last token, goes through a decode step, so what is judged is
decoding under the compressed cache, never the dense prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtool.cache.segment_cache import Protocol, SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.retrieval import excerpt

Progress = Callable[[str], None]
SIDES = ("full", "plan")


@dataclass(frozen=True)
class Subject:
    """A model, a plan, and how prompts are fed. `chunk` is the prefill chunk in tokens, 0 for the whole prompt at
    once, as it always is under plans that ask for that (`Plan.at_once`)."""

    model: Model
    plan: Plan
    protocol: Protocol = "official"
    chunk: int = 0
    seed: int = 0

    def cache(self, side: str, prompt_length: int) -> SegmentCache:
        """A fresh cache: the full one, or the plan's."""
        plan = self.plan if side == "plan" else None
        return SegmentCache(self.model, plan, protocol=self.protocol, prompt_length=prompt_length)

    def prefill(self, cache: SegmentCache, tokens: torch.Tensor) -> None:
        """tokens int64 [B,T] without padding."""
        size = (0 if cache.at_once else self.chunk) or max(1, tokens.shape[1])
        with self.model.served(), torch.no_grad():
            for start in range(0, tokens.shape[1], size):
                piece = tokens[:, start : start + size].to(self.model.device)
                self.model.network.base_model(input_ids=piece, past_key_values=cache)
        cache.finish()

    def step(self, cache: SegmentCache, tokens: torch.Tensor) -> torch.Tensor:
        """One decode step: tokens int64 [B,1] → logits fp32 [B,V]."""
        with self.model.served(), torch.no_grad():
            output = self.model.network(input_ids=tokens.to(self.model.device), past_key_values=cache)
        return output.logits[:, -1].float()

    def both(self, prompts: torch.Tensor, follow: torch.Tensor | None = None) -> dict[str, SegmentCache]:
        """Both sides' caches after prompts int64 [B,T], which `follow` int64 [B,A] is to be fed to, for plans that look
        ahead. A dense prefill is the same for both, so it is run once."""
        fed = self._fed(prompts)
        caches = {side: self.cache(side, tokens.shape[1]) for side, tokens in zip(SIDES, (prompts, fed), strict=True)}
        if follow is not None:
            caches["plan"].tell(follow)
        caches["full"].record_for(self.plan)
        self.prefill(caches["full"], prompts)
        if fed is prompts and self.protocol == "official" and not self.chunk and self.plan.dense:
            caches["plan"].adopt(caches["full"])
        else:
            self.prefill(caches["plan"], fed)
        return caches

    def _fed(self, prompts: torch.Tensor) -> torch.Tensor:
        """What the plan's cache is fed: the prompts int64 [B,T], or an excerpt of the only one for a draft."""
        draft = self.plan.draft
        if draft is None or draft.excerpt is None:
            return prompts
        return excerpt(self.model, prompts[0], draft.excerpt)[None]

    def below(self, full: SegmentCache) -> SegmentCache | None:
        """The cache that proposes to the plan's, if its draft has one; `full` holds the prompt."""
        draft = self.plan.draft
        if draft is None or draft.below is None:
            return None
        cache = SegmentCache(self.model, Plan("below", self.plan.model, keep=draft.below))
        cache.adopt(full)
        return cache

    def greedy(self, cache: SegmentCache, token: torch.Tensor, steps: int) -> torch.Tensor:
        """A prefilled cache and their prompts' last tokens int64 [B,1] → the next [B,steps], stops not heeded."""
        out = []
        for _ in range(steps):
            token = self.step(cache, token).argmax(-1, keepdim=True)
            out.append(token.cpu())
        return torch.cat(out, dim=1)


@dataclass(frozen=True)
class Result:
    """`metrics`: flat numbers that `--fail-if` can bound; `detail`: everything else, JSON-able."""

    metrics: dict[str, float]
    detail: dict[str, Any] = field(default_factory=dict)


def half(source: tuple[str, ...]) -> str | None:
    """Of the default text, what nothing was calibrated on; a user's own text has no halves."""
    return "held-out" if "default" in source else None


def batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Consecutive lists of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
