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
from tests.laws.stores import _pairs
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close

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
