"""All tokens at once see what a decode step each would have seen, under every method's plan."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.plan import Plan
from kvtool.replay.forced import forced
from kvtool.slots import RAW, Store
from tests import models
from tests.laws.methods import TINY, on
from tests.laws.readings import reading
from tests.laws.stores import _pairs
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, error, same

PROMPT, TOKENS = 24, 18
IDS = random_ids(2, PROMPT + TOKENS, seed=21)


def stepped(model, plan: Plan) -> torch.Tensor:
    cache = SegmentCache(model, plan, prompt_length=PROMPT)
    return feed(model, cache, IDS, [PROMPT, *[1] * TOKENS])[:, PROMPT:]


def at_once(model, plan: Plan) -> torch.Tensor:
    cache = SegmentCache(model, plan, prompt_length=PROMPT)
    feed(model, cache, IDS[:, :PROMPT], [PROMPT])
    return forced(model, cache, IDS[:, PROMPT:])


@pytest.mark.parametrize("case", TINY)
def test_forced_is_decode(case: str) -> None:
    model, plan = on(case, models.shared("llama"))
    close(at_once(model, plan), stepped(model, plan).float(), torch.float32)


def test_layers_that_are_written_as_one_go_token_by_token() -> None:
    model = models.double("llama")
    g = model.geometry
    key, value = _pairs(2 * g.kv_heads)["four-bits"]
    index = torch.zeros(g.layers, g.kv_heads, dtype=torch.int32)
    index[g.layers // 2 * 2 :] = RAW
    first = torch.arange(g.layers, dtype=torch.int32) // 2 * 2
    first[g.layers // 2 * 2 :] = torch.arange(g.layers // 2 * 2, g.layers)
    plan = Plan("by hand", model.fingerprint, store=Store((key,), (value,), index, recent=2, block=8, first=first))
    close(at_once(model, plan), stepped(model, plan).float(), torch.float32)


@pytest.mark.parametrize("name", ["asked", "asked-documents", "asked-mean", "asked-each"])
def test_a_question_is_asked_in_one_piece(name: str) -> None:
    """Under plans that read what it asks for, it is a prompt of its own, and the prompt before it has no say."""
    model, question = models.double("llama"), 7
    made = reading(model, name)
    cache = SegmentCache(model, made, prompt_length=PROMPT)
    feed(model, cache, IDS[:, :PROMPT], [PROMPT])
    found = forced(model, cache, IDS[:, PROMPT:], question)
    asked = SegmentCache(model, made, prompt_length=PROMPT)
    feed(model, asked, IDS[:, :PROMPT], [PROMPT])
    asked.finish()
    chunks = [question, *[1] * (TOKENS - question)]
    close(found, feed(model, asked, IDS[:, PROMPT:], chunks, shift=PROMPT).float(), torch.float32)
    readers = [lane.reader for layer in asked.segments for lane in layer.lanes()]  # type: ignore[attr-defined]
    assert all(reader.asking.held.shape[3] == min(question, reader.asking.count) for reader in readers)
    assert error(found[:, question:], at_once(model, made)[:, question:]) > 1e-2


@pytest.mark.parametrize("name", ["minmax", "probe", "wave"])
def test_to_other_plans_a_question_is_steps(name: str) -> None:
    model = models.double("llama")
    cache = SegmentCache(model, reading(model, name), prompt_length=PROMPT)
    feed(model, cache, IDS[:, :PROMPT], [PROMPT])
    same(forced(model, cache, IDS[:, PROMPT:], 7), at_once(model, reading(model, name)))
