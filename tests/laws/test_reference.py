"""Law 2, second half: what the cache computes equals the dense masked reference, token for token."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from tests.laws.methods import TINY, across, known, on, only, places, ragged, sparse
from tests.laws.reference import dense
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error

IDS = random_ids(1, 34, seed=2)
CHUNKS = [14, 9, *[1] * 6, 5]


def test_the_reference_without_a_plan_is_the_model(any_model: Model) -> None:
    close(dense(any_model, IDS[0], None, [34]), own(any_model, IDS)[0])


@pytest.mark.parametrize("protocol", ["official", "strict"])
@places(TINY, turn=1)
def test_methods(case: str, protocol: str, model: Model) -> None:
    only(known(case), "the definition does not know a rule of this selection")
    only(protocol == "strict" or not sparse(case), "what a prompt reads is defined in tests/cache/read/prefilling.py")
    model, plan = on(case, model)
    only(not across(plan), "the definition runs layer by layer; see tests/cache/store/test_pool.py")
    cache = SegmentCache(model, plan, protocol=protocol)
    expected = dense(model, IDS[0], plan, CHUNKS, strict=protocol == "strict")
    close(feed(model, cache, IDS, CHUNKS)[0], expected, torch.float32)


@pytest.mark.parametrize(("protocol", "seed"), [("official", 0), ("strict", 1)])
@pytest.mark.parametrize(("position", "compensate"), [("original", True), ("reindex", False)])
def test_ragged_plans(position: str, compensate: bool, protocol: str, seed: int, any_model: Model) -> None:
    plan = ragged(any_model, seed=seed, position=position, compensate=compensate)
    expected = dense(any_model, IDS[0], plan, CHUNKS, strict=protocol == "strict")
    cache = SegmentCache(any_model, plan, protocol=protocol)
    close(feed(any_model, cache, IDS, CHUNKS)[0], expected)
    if any(window is None for window in any_model.geometry.windows):
        assert error(expected, own(any_model, IDS)[0]) > 0.1  # or this test could not fail
