"""Tokens whose text says that something ends, for methods whose units are sentences or documents."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvtool.errors import InputError
from kvtool.model import Model


def ending(model: Model, what: str, ends: Callable[[str], bool], marks: tuple[str, ...]) -> torch.Tensor:
    """The tokens that `ends` accepts by their text, int32 [n]; raises InputError without a tokenizer, or if none do."""
    if model.tokenizer is None:
        raise InputError(
            f"{what}s are told by their tokens", got="no tokenizer", remedy="pass a model with its tokenizer",
        )  # fmt: skip
    texts = [model.tokenizer.decode([token]) for token in range(len(model.tokenizer))]
    found = [token for token, text in enumerate(texts) if ends(text)]
    if not found:
        raise InputError(f"no token ends a {what}", got=f"marks {marks}", remedy="other marks, or other units")
    return torch.tensor(found, dtype=torch.int32)
