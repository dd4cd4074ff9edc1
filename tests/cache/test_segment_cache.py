"""What a cache refuses, and what it does between batches."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.replay.forced import forced
from tests.laws.methods import ragged
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same


def test_unknown_protocol(llama: Model) -> None:
    with pytest.raises(InputError, match="unknown protocol"):
        SegmentCache(llama, protocol="loose")  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [slice(8, 12), slice(4, 5)], ids=["right", "hole"])
def test_padding_anywhere_but_on_the_left_is_refused(hidden: slice, llama: Model) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, hidden] = 0
    with pytest.raises(InputError, match="left"):
        feed(llama, SegmentCache(llama), random_ids(2, 12), [12], mask=mask)


def test_a_cache_that_was_reset_is_as_good_as_new(llama: Model) -> None:
    plan, ids = ragged(llama), random_ids(2, 20)
    cache = SegmentCache(llama, plan)
    feed(llama, cache, random_ids(1, 30, seed=1), [30])
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    same(feed(llama, cache, ids, [14, *[1] * 6]), feed(llama, SegmentCache(llama, plan), ids, [14, *[1] * 6]))


def test_a_reset_cache_has_its_own_protocol_again(llama: Model) -> None:
    """Forced tokens are fed under another one."""
    plan, ids = ragged(llama), random_ids(1, 20)
    cache = SegmentCache(llama, plan)
    feed(llama, cache, random_ids(1, 30, seed=1), [30])
    forced(llama, cache, ids)
    assert all(layer.strict and layer.decoded for layer in cache.segments)
    cache.reset()
    assert not any(layer.strict or layer.decoded for layer in cache.segments)
    same(feed(llama, cache, ids, [20]), feed(llama, SegmentCache(llama, plan), ids, [20]))
    strict = SegmentCache(llama, plan, protocol="strict")
    strict.reset()
    assert all(layer.strict for layer in strict.segments)
