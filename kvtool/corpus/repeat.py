"""A random string of tokens repeated: whatever is predicted from the second copy on is read from the earlier
ones.

Induction and echo heads show themselves here (RazorAttention, arXiv:2407.15891): tokens = start + R·copies
with the R ids independent and uniform over the ordinary vocabulary, or over [low, high) of it. The released
scorer of that paper used copies = 4 and R = 2500 ids out of [10000, 12500). Needs no tokenizer.
"""

from __future__ import annotations

import random

import torch

from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.errors import InputError
from kvtool.model import Model


def repeat(
    model: Model | int,
    *,
    period: int = 256,
    copies: int = 4,
    samples: int = 4,
    seed: int = 0,
    low: int = 0,
    high: int | None = None,
) -> Corpus:
    """`samples` prompts of start + `period`·`copies` tokens; `model` may also be just a vocabulary size.

    Raises InputError for counts below 1 or a range that holds no ordinary token.
    """
    for name, value in (("period", period), ("copies", copies), ("samples", samples)):
        if value < 1:
            raise InputError(f"{name} of the repeat corpus", got=value, expected="1 or more")
    ordinary = _ordinary(model, low, high)
    start = [] if isinstance(model, int) else model.start
    rng = random.Random(seed)
    made = []
    for _ in range(samples):
        ids = start + rng.choices(ordinary, k=period) * copies
        made.append(Sample(torch.tensor(ids, dtype=torch.long), "repeat", period=period, length=len(ids)))
    options = dict(period=period, copies=copies, samples=samples, low=low, high=high)
    return gather("repeat", made, seed=seed, options=options, sources=[f"{len(ordinary)} token ids"])


def _ordinary(model: Model | int, low: int, high: int | None) -> list[int]:
    """The ids of [low, high) that stand for text: no control tokens, no rows that merely pad the
    embedding.
    """
    size = model if isinstance(model, int) else model.geometry.vocabulary
    special: set[int] = set()
    if not isinstance(model, int) and model.tokenizer is not None:
        size = min(size, len(model.tokenizer))
        added = model.tokenizer.added_tokens_decoder.items()
        special = {*model.tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}
    high = size if high is None else high
    ordinary = [token for token in range(max(low, 0), min(high, size)) if token not in special]
    if not ordinary or high > size or low < 0:
        raise InputError("the range of token ids", got=f"[{low}, {high})", expected=f"a part of [0, {size})")
    return ordinary
