"""Law 1: the lossless setting reproduces the model's own logits and its own decode."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from kvtool.cache.build import per_row
from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import LOSSLESS, across, lossless, only, places
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, same

IDS = random_ids(2, 30, seed=3)
CHUNKINGS = ([30], [22, *[1] * 8], [11, 12, 1, 6])


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
def test_full_cache(chunks: list[int], any_model: Model) -> None:
    logits = feed(any_model, SegmentCache(any_model), IDS, chunks)
    close(logits, own(any_model, IDS))
    close(logits, own(any_model, IDS, [22, *[1] * 8]))


@pytest.mark.parametrize("protocol", ["official", "strict"])
@places(LOSSLESS, turn=2)
def test_methods(case: str, protocol: str, model: Model) -> None:
    only(protocol == "official" or not across(lossless(case, model.name)), "layers are written as one")
    expected = own(model, IDS)
    for chunks in CHUNKINGS:
        cache = SegmentCache(model, lossless(case, model.name), protocol=protocol, prompt_length=sum(chunks))
        close(feed(model, cache, IDS, chunks), expected)


@pytest.mark.parametrize(
    "options", [dict(do_sample=False), dict(do_sample=False, num_beams=3)], ids=["greedy", "beams"]
)
@pytest.mark.parametrize("case", [None, *LOSSLESS])
def test_generate(case: str | None, options: dict[str, int], llama: Model) -> None:
    plan = None if case is None else lossless(case, llama.name)
    only("num_beams" not in options or not per_row(plan), "rows may come to hold different numbers of entries")
    prompt, mask = IDS[:, :9], torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    options = options | dict(attention_mask=mask, max_new_tokens=12, pad_token_id=0)
    expected = llama.network.generate(prompt, past_key_values=DynamicCache(config=llama.network.config), **options)
    with llama.served():
        cache = SegmentCache(llama, plan, prompt_length=9)
        same(llama.network.generate(prompt, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [None, *LOSSLESS])
def test_other_dtypes(case: str | None, dtype: torch.dtype) -> None:
    model = models.build("llama")
    model.network.to(dtype)
    plan: Plan | None = None
    if case is not None:  # fp32 and bf16 loads of the same weights have the same fingerprint, but these weights are new
        plan = dataclasses.replace(lossless(case, "llama"), model=model.fingerprint)
        only(
            (plan.read is None and not across(plan)) or dtype == torch.float64,
            "attention over each segment that is read is rounded before the merge, not once",
        )
    logits = feed(model, SegmentCache(model, plan, prompt_length=30), IDS, [22, *[1] * 8])
    expected = own(model, IDS)
    scale = (
        expected.float().std()
    )  # rounding is relative to the largest activations, so compare in units of their spread
    close(logits / scale, expected / scale, torch.float32 if dtype == torch.float64 else dtype)
