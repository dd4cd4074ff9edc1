"""Law 5, second half: constants, zeros, huge values and poisoned slack give no NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.window import Window
from kvtool.model import Model
from tests import models
from tests.laws.methods import TINY, places, ragged, tiny
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, same

CHUNKS = [13, 9, *[1] * 8]


@places(TINY, turn=1)
def test_constant_tokens(case: str, model: Model) -> None:
    logits = feed(model, SegmentCache(model, tiny(case, model.name)), torch.full((1, 30), 5), CHUNKS)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("protocol", ["official", "strict"])
def test_equal_values_are_returned_whatever_is_dropped(protocol: str, llama: Model) -> None:
    """With the same value at every position attention returns it, so no eviction can be seen."""
    model = models.build("llama")
    for layer in model.network.model.layers:
        layer.self_attn.v_proj.weight.zero_()
    plan, ids = ragged(model), random_ids(1, 30)
    close(feed(model, SegmentCache(model, plan, protocol=protocol), ids, CHUNKS), own(model, ids))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4], ids=str)
@pytest.mark.parametrize("case", TINY)
def test_zero_tiny_and_huge_keys(case: str, scale: float) -> None:
    model = models.build("llama")
    for layer in model.network.model.layers:
        layer.self_attn.k_proj.weight *= scale
    plan = tiny(case, "llama")
    plan = dataclasses.replace(plan, model=model.fingerprint)
    logits = feed(model, SegmentCache(model, plan), random_ids(2, 30), CHUNKS)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("case", [None, *TINY])
def test_unused_room_is_never_read(case: str | None, llama: Model) -> None:
    plan, ids = None if case is None else tiny(case, llama.name), random_ids(2, 9)
    expected = feed(llama, SegmentCache(llama, plan), ids, [4, 1, 1, 1, 1, 1])
    cache = SegmentCache(llama, plan)
    logits = [feed(llama, cache, ids[:, :4], [4])]
    for at in range(4, 9):
        for layer in cache.segments:
            for lane in layer.lanes():
                if isinstance(lane, Bulk):
                    for segment in (lane.sinks, lane.recent):
                        if segment.k is not None and segment.v is not None:
                            segment.k[:, :, segment.length :] = segment.v[:, :, segment.length :] = float("nan")
                elif isinstance(lane, Window):
                    used = min(at, lane.sink + lane.recent)
                    lane.keys[:, :, used:] = lane.values[:, :, used:] = float("nan")
        with llama.served(), torch.no_grad():
            logits.append(llama.network(input_ids=ids[:, at : at + 1], past_key_values=cache).logits)
    same(torch.cat(logits, dim=1), expected)


def test_a_row_of_padding_only(llama: Model) -> None:
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1] = 0
    for plan in (None, ragged(llama)):
        logits = feed(llama, SegmentCache(llama, plan), ids, [6, *[1] * 6], mask=mask)
        alone = feed(llama, SegmentCache(llama, plan), ids[:1], [6, *[1] * 6])
        assert bool(torch.isfinite(logits).all())
        close(logits[:1], alone)
