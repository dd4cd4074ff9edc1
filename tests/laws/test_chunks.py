"""Law 2, first half: prefill and decode are one function, however the tokens are cut into chunks.

It holds in the protocol "strict", where a windowed head sees only its window in prefill too. In "official" a chunk is
seen whole.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from tests import models
from tests.laws.methods import TINY, across, by_chunk, on, only, places, ragged, selects, sparse, tiny
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error

TOKENS = 28
IDS = random_ids(2, TOKENS, seed=4)


@functools.cache
def one_by_one(case: str, name: str) -> torch.Tensor:
    model, plan = on(case, models.shared(name))
    return feed(model, SegmentCache(model, plan, protocol="strict"), IDS, [1] * TOKENS)


def cut(lengths: list[int]) -> list[int]:
    """Chunk lengths that sum to TOKENS, from any list of lengths."""
    chunks: list[int] = []
    for length in lengths:
        chunks.append(min(length, TOKENS - sum(chunks)))
    return [chunk for chunk in [*chunks, TOKENS - sum(chunks)] if chunk]


@places(TINY, turn=1)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 14), max_size=12))
def test_any_chunking_is_decode(case: str, model: Model, lengths: list[int]) -> None:
    only(not selects(case), "it matters where the prompt ends")
    name = model.name
    model, plan = on(case, model)
    only(not across(plan), "layers are written as one")
    cache = SegmentCache(model, plan, protocol="strict")
    close(feed(model, cache, IDS, cut(lengths)), one_by_one(case, name), torch.float32)


@pytest.mark.parametrize("chunks", [[5, 9, 6], [8, 12]], ids=str)
@places(TINY, turn=1)
def test_a_selection_does_not_depend_on_the_prompts_cut(case: str, chunks: list[int], model: Model) -> None:
    """It depends on where the prompt ends. A chunk of one token after the first is a decode step and ends it."""
    only(selects(case) and not by_chunk(case), "any chunking is decode, or the plan evicts after every chunk")
    only(not sparse(case), "what a chunk reads depends on its cut; see tests/cache/read/test_sparse.py")
    model, plan = on(case, model)
    rest = [1] * (TOKENS - 20)
    whole, cut = (feed(model, SegmentCache(model, plan), IDS, [*prompt, *rest]) for prompt in ([20], chunks))
    close(cut, whole, torch.float32)


@places(TINY, turn=2)
def test_a_prompt_fed_at_once_is_seen_whole(case: str, model: Model) -> None:
    only(tiny(case, model.name).dense, "layers are dropped, or a prompt is not read whole")
    cache = SegmentCache(model, tiny(case, model.name))
    close(feed(model, cache, IDS, [TOKENS]), own(model, IDS))


@pytest.mark.parametrize("chunks", [[28], [9, 9, 10], [13, *[1] * 15]], ids=str)
def test_corner_cases_of_attention(chunks: list[int], any_model: Model) -> None:
    plan = ragged(any_model, seed=5)
    decode = feed(any_model, SegmentCache(any_model, plan, protocol="strict"), IDS, [1] * TOKENS)
    close(feed(any_model, SegmentCache(any_model, plan, protocol="strict"), IDS, chunks), decode)


def test_more_rows_than_a_block(llama: Model) -> None:
    ids, plan = random_ids(1, 530, seed=5), ragged(llama, seed=6)
    whole = feed(llama, SegmentCache(llama, plan, protocol="strict"), ids, [530])
    parts = feed(llama, SegmentCache(llama, plan, protocol="strict"), ids, [255, 2, 257, *[1] * 16])
    close(whole, parts)
    assert error(whole, own(llama, ids)) > 0.1
