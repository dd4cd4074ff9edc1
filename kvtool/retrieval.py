"""A shorter prompt: the chunks of a prompt that its question asks for, in order, and the question.

    chunks of `chunk` tokens between the first `start` and the last `question` tokens;   each is scored by the question;
    the best that score `least` are taken, up to `budget` tokens;   prompt' = start · chunks in order · question

RAPID (arXiv 2502.20330) has a retriever of its own, an embedding model. Both scores here are ours:

    "embedding"   cosine of the mean input embeddings of chunk and question, the prompt's mean taken off both
    "words"       Σ log(1 + C/n_t) over the distinct tokens t of the question that stand in the chunk, of C chunks, n_t
                  of which have t

Spans that are given are taken as they are. Start tokens of the model's own, where a prompt has them, always stay. It
knows no cache.
"""

from __future__ import annotations

import torch

from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.slots import Excerpt


def excerpt(model: Model, tokens: torch.Tensor, spec: Excerpt) -> torch.Tensor:
    """The shorter prompt, int64 [T'], of tokens int64 [T]."""
    total = len(tokens)
    stays = torch.zeros(total, dtype=torch.bool)
    for low, high in spans(model, tokens, spec):
        stays[low:high] = True
    stays[: _start(model, tokens, spec)] = stays[max(0, total - spec.question) :] = True
    return tokens[stays]


def _start(model: Model, tokens: torch.Tensor, spec: Excerpt) -> int:
    """First tokens that always stay."""
    own = model.start
    return max(spec.start, len(own)) if tokens[: len(own)].tolist() == own else spec.start


def spans(model: Model, tokens: torch.Tensor, spec: Excerpt) -> list[tuple[int, int]]:
    """The chunks that are taken, from … to, in order. Raises InputError for given ones beyond the prompt."""
    low = _start(model, tokens, spec)
    high = max(low, len(tokens) - spec.question)
    if spec.spans is not None:
        given = [(int(first), int(end)) for first, end in spec.spans]
        if any(first < 0 or end > len(tokens) for first, end in given):
            raise InputError("spans beyond the prompt", got=given, expected=f"tokens 0 to {len(tokens)}")
        return given
    chunks = [(at, min(at + spec.chunk, high)) for at in range(low, high, spec.chunk)]
    if not chunks:
        return []
    scores = SCORES[spec.score](model, tokens, chunks, tokens[high:])
    room = spec.budget * len(tokens) if spec.budget <= 1 else spec.budget
    found = []
    for index in torch.argsort(scores, descending=True, stable=True).tolist():
        first, end = chunks[index]
        if scores[index] >= spec.least and end - first <= room:
            found.append(chunks[index])
            room -= end - first
    return sorted(found)


def _embedding(
    model: Model, tokens: torch.Tensor, chunks: list[tuple[int, int]], question: torch.Tensor
) -> torch.Tensor:
    table = model.network.get_input_embeddings()

    def mean(ids: torch.Tensor) -> torch.Tensor:
        return table(ids.to(model.device)).detach().float().mean(0)

    common = mean(tokens)
    each = torch.stack([mean(tokens[low:high]) for low, high in chunks]) - common
    return torch.cosine_similarity(each, (mean(question) - common)[None], dim=-1).clamp(-1, 1).cpu()


def _words(model: Model, tokens: torch.Tensor, chunks: list[tuple[int, int]], question: torch.Tensor) -> torch.Tensor:
    asked = question.unique()
    there = torch.stack([torch.isin(asked, tokens[low:high]) for low, high in chunks]).float()
    return there @ torch.log1p(len(chunks) / there.sum(0).clamp_min(1))


SCORES = {"embedding": _embedding, "words": _words}
