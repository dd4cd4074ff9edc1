"""The slot draft: the cache only proposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvtool.errors import InputError
from kvtool.records import Record
from kvtool.slots.keep import Keep


@dataclass(frozen=True)
class Excerpt(Record):
    """A shorter prompt for the draft: chunks of the prompt that a retriever chooses, in order, and its end.

    spans: int32 [n,2], tokens from … to of the prompt, given; None: chosen by `score` (see `retrieval.py`). chunk:
    tokens of a chunk. budget: tokens of the chunks that are taken, a share of the prompt when ≤ 1, else a count; only
    those that score `least`. start, question: first and last tokens that are always there, besides start tokens of the
    model's own; the last ones ask.
    """

    spans: torch.Tensor | None = None
    score: Literal["embedding", "words"] = "embedding"
    chunk: int = 64
    budget: float = 0.25
    least: float = -1.0
    start: int = 0
    question: int = 64

    def __post_init__(self) -> None:
        if min(self.chunk, self.question) < 1 or self.start < 0 or not self.budget > 0:
            raise InputError(
                "bad excerpt", got=self, expected="chunk, question >= 1, start >= 0 and budget > 0",
            )  # fmt: skip
        if self.spans is not None and (self.spans.dim() != 2 or bool((self.spans[:, 0] > self.spans[:, 1]).any())):
            raise InputError("bad spans of an excerpt", got=self.spans.tolist(), expected="pairs of from ≤ to")


@dataclass(frozen=True)
class Draft(Record):
    """The cache only proposes: `tokens` at a time, verified by the full cache.

    below, ahead: what a second, smaller cache of the same model keeps, which proposes to this one `ahead` tokens at a
        time. None: there is none.
    excerpt: the drafting cache has a prompt of its own. None: it holds the prompt that the full cache holds.
    eta, alpha: the full cache's logits are moved towards the draft by `eta` times the difference of the two laws, for
        tokens that the draft gives at least `alpha` of its largest probability (RAPID). Above 0 this is lossy: what is
        written is no longer the full cache's.
    """

    tokens: int = 4
    below: Keep | None = None
    ahead: int = 2
    excerpt: Excerpt | None = None
    eta: float = 0.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if min(self.tokens, self.ahead) < 1 or not self.eta >= 0 or not 0 <= self.alpha <= 1:
            raise InputError(
                "bad draft", got=f"tokens {self.tokens}, ahead {self.ahead}, eta {self.eta}, alpha {self.alpha}",
                expected="tokens, ahead >= 1, eta >= 0 and alpha from 0 to 1",
            )  # fmt: skip
        if self.below is not None and self.excerpt is not None:
            raise InputError("a draft with a prompt of its own has no cache below it that holds the same prompt")

    @property
    def lossless(self) -> bool:
        """The slot is filled; that the output is the full cache's is the draft's point, not its absence."""
        return False
