"""What a corpus is: token sequences with what is known about them, and where they came from.

A `Sample` is one prompt. The probes, all kinds but text, also know the right continuation and
where in the prompt it can be read. A `Corpus` is a tuple of samples with a JSON-able provenance, whose hash
is over the token ids: equal hashes mean equal prompts, whatever files and options they came from.

It does not know how tokens are made; each file of this folder makes one kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.errors import InputError
from kvtool.files import digest
from kvtool.model import Model

Span = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One prompt. Spans are [start, end) positions in `tokens`."""

    tokens: torch.Tensor  # int64 [T], the prompt with the model's start tokens in front
    kind: str  # the corpus's: "text", "passkey", ...
    answer: torch.Tensor | None = None  # int64 [A], expected greedy continuation, without a stop token
    evidence: tuple[Span, ...] = ()  # what must be recalled: the key's digits, the needle, the facts
    labels: tuple[Span, ...] = ()  # answers inside `tokens`: positions whose token is to be predicted
    period: int | None = None  # repeat: R; tokens = start + R·copies
    length: int = 0  # nominal length in tokens, a grid coordinate
    depth: float = 0.0  # 0..1, where the evidence lies, a grid coordinate
    question: int | None = None  # where in `tokens` the question begins: what stands before it is the context


@dataclass(frozen=True)
class Corpus:
    """Samples and their provenance: kind, sources, options, seed, samples, tokens (their sum), hash."""

    samples: tuple[Sample, ...]
    provenance: dict[str, Any]


def gather(
    kind: str, samples: Iterable[Sample], *, seed: int, options: dict[str, Any], sources: Iterable[str] = ()
) -> Corpus:
    """Samples → corpus with its provenance. Raises InputError when there are none."""
    samples = tuple(samples)
    if not samples:
        raise InputError(f"the {kind} corpus is empty", expected="at least one sample")
    return Corpus(
        samples,
        {
            "kind": kind,
            "sources": list(sources),
            "options": {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()},
            "seed": seed,
            "samples": len(samples),
            "tokens": sum(len(sample.tokens) for sample in samples),
            "hash": digest(*(sample.tokens for sample in samples)),
        },
    )


def piece(model: Model, text: str, before: str = ".") -> list[int]:
    """The ids that `text` gets when it follows `before`.

    Tokenizers that mark word starts would put a second mark before a piece tokenised alone. Where `before`
    and `text` share a token the ids of `text` alone are returned.
    """
    head, whole = model.ids(before).tolist(), model.ids(before + text).tolist()
    return whole[len(head) :] if whole[: len(head)] == head else model.ids(text).tolist()
