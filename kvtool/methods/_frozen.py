"""Budgets that depend on the prompt, frozen: run the selection on texts, and keep each head's mean share.

What a rule of `cache/keep/budgets/` decides for each prompt becomes a number per layer and KV head, known beforehand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kvtool.corpus.base import Sample
from kvtool.methods._base import Context
from kvtool.methods._filled import filled
from kvtool.methods._prompts import texts
from kvtool.slots import Keep


def frozen(context: Context, keep: Keep, *, samples: int, tokens: int) -> tuple[Keep, torch.Tensor]:
    """keep selects by the prompt → keep with budgets fp32 [L,K], shares of a prompt, and the same shares.

    `samples` texts of `tokens` tokens come from the half of the default text that calibration may see. Raises
    InputError without a model.
    """
    shares, select = kept(context, keep, samples=samples, tokens=tokens), keep.select
    assert select is not None
    fixed: dict[str, Any] = {"spread": "head", "floor": 0.0, "mass": 0.0, "least": 0.0, "settings": {}}
    return dataclasses.replace(keep, select=dataclasses.replace(select, budget=shares, **fixed)), shares


def kept(context: Context, keep: Keep, *, samples: int, tokens: int) -> torch.Tensor:
    """fp32 [L,K]: the share of a text's entries that stays, on average."""
    return measured(context, keep, texts(context, samples=samples, tokens=tokens))


def measured(context: Context, keep: Keep, samples: Sequence[Sample]) -> torch.Tensor:
    """fp32 [L,K]: the share of these prompts' entries that stays, on average."""
    total = torch.zeros(context.geometry.layers, context.geometry.kv_heads)
    for sample, cache in zip(samples, filled(context, keep, samples, "budgets"), strict=True):
        cache.finish()
        total += cache.entries() / len(sample.tokens)
    return (total / len(samples)).clamp(max=1.0)
