"""Budgets that depend on the prompt, frozen: run the selection on texts, and keep each head's mean share.

What a rule of `cache/budgets/` decides for each prompt becomes a number per layer and KV head, known beforehand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.methods._base import Context
from kvtool.plan import Plan
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
    if context.model is None:
        raise InputError("budgets are calibrated on the model", remedy="pass the model instead of a trace")
    corpus = text(context.model, ["default"], tokens=tokens, samples=samples, seed=context.seed, half="calibration")
    return measured(context, keep, corpus.samples)


def measured(context: Context, keep: Keep, samples: Sequence[Sample]) -> torch.Tensor:
    """fp32 [L,K]: the share of these prompts' entries that stays, on average."""
    model = context.model
    assert model is not None
    plan = Plan("frozen", model.fingerprint, keep=keep)
    total = torch.zeros(context.geometry.layers, context.geometry.kv_heads)
    for number, sample in enumerate(samples):
        cache = SegmentCache(model, plan, prompt_length=len(sample.tokens))
        with model.served(), torch.no_grad():
            model.network.base_model(input_ids=sample.tokens[None].to(model.device), past_key_values=cache)
        cache.finish()
        total += cache.entries() / len(sample.tokens)
        context.progress(number + 1, len(samples), "budgets")
    return (total / len(samples)).clamp(max=1.0)
