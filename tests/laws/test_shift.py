"""Attention sees only differences of positions: moving all of them changes nothing, in any cache."""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from tests.laws.methods import TINY, on, only, places, ragged, sees_channels
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close

IDS, CHUNKS = random_ids(1, 30, seed=14), [12, 7, *[1] * 11]


@places([None, *TINY], turn=2)
def test_methods(case: str | None, model: Model) -> None:
    plan = None
    if case is not None:
        only(not sees_channels(case), "looks at single channels of rotated keys")
        model, plan = on(case, model)
    moved, still = (feed(model, SegmentCache(model, plan), IDS, CHUNKS, shift=shift) for shift in (37, 0))
    close(moved, still, torch.float32)


def test_corner_cases_of_attention(any_model: Model) -> None:
    plan = ragged(any_model, position="reindex", compensate=False)
    moved, still = (feed(any_model, SegmentCache(any_model, plan), IDS, CHUNKS, shift=shift) for shift in (37, 0))
    close(moved, still)
