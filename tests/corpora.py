"""Tiny corpora of token ids for every kind that a statistic asks for; none needs a tokenizer."""

from __future__ import annotations

import torch

from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.corpus.repeat import repeat
from kvtool.model import Model
from tests.models import random_ids, repeated


def text(model: Model, *, samples: int = 3, tokens: int = 40, seed: int = 0) -> Corpus:
    """Random tokens, of slightly different lengths."""
    made = [Sample(random_ids(1, tokens + index, seed=1000 * seed + index)[0], "text") for index in range(samples)]
    return gather("text", made, seed=seed, options={})


def needle(model: Model, *, samples: int = 3, size: int = 12, seed: int = 0) -> Corpus:
    """Distinct random tokens with a needle in their midst; the prompt ends with the token before the needle."""
    made = []
    for index in range(samples):
        hay = repeated(60 + index, 1, seed=1000 * seed + index)
        start = 20 + 3 * index
        prompt = torch.cat([hay, hay[start - 1 : start]])
        span = (start, start + size)
        made.append(Sample(prompt, "needle", answer=hay[start : start + size], evidence=(span,)))
    return gather("needle", made, seed=seed, options={})


def repeats(model: Model, *, period: int = 20, copies: int = 3, samples: int = 2, seed: int = 0) -> Corpus:
    return repeat(model, period=period, copies=copies, samples=samples, seed=seed)


KINDS = {"text": text, "needle": needle, "repeat": repeats}


def corpora(model: Model, *, seed: int = 0) -> dict[str, Corpus]:
    """One small corpus of every kind."""
    return {kind: build(model, seed=seed) for kind, build in KINDS.items()}
