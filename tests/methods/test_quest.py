"""Known answers of Quest, card C4."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.read.summaries import minmax
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.model import Model
from tests import models
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error

IDS, CHUNKS = random_ids(1, 60, seed=4), [50, *[1] * 10]


def run(model: Model, **settings: object) -> tuple[torch.Tensor, SegmentCache]:
    plan = calibrate("quest", dict(dense=0, recent=1) | settings, model=model)
    cache = SegmentCache(model, plan)
    return feed(model, cache, IDS, CHUNKS), cache


@pytest.mark.parametrize("page", [1, 4])
def test_no_logit_of_a_page_exceeds_its_bound(page: int) -> None:
    """With one entry, or equal ones, the bound is the logit."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=draw), torch.randn(1, 2, 5, page, 8, generator=draw)
    for keys, tight in ((k, page == 1), (k[:, :, :, :1].expand_as(k), True)):
        bound = minmax.score(q, minmax.summarise(keys, Given()), Given())
        logits = (q[:, :, :, None, None] * keys[:, :, None]).sum(-1).amax(-1)
        assert bool((bound >= logits - 1e-5).all())
        assert (error(bound, logits) < 1e-5) == tight


def test_pages_of_one_entry_are_chosen_by_their_logits() -> None:
    model = models.double("llama")
    exact = calibrate("sparf", dict(budget=5, channels=8, tail="drop", heads="max", recent=1), model=model)
    close(run(model, budget=5, page=1)[0], feed(model, SegmentCache(model, exact), IDS, CHUNKS))


def test_query_heads_that_choose_apart_read_more() -> None:
    """Each has pages of its own, as in the released code, and their union is what a KV head reads."""
    model = models.double("llama")
    (one, together), (other, apart) = (run(model, budget=8, page=4, heads=heads) for heads in ("max", "each"))
    assert together.read_bytes < apart.read_bytes
    assert error(one, other) > 1e-3
    alone = models.double("mha")  # where there is one query head, both are the same
    close(*(run(alone, budget=8, page=4, heads=heads)[0] for heads in ("max", "each")))


def test_everything_is_read_where_the_budget_is_everything() -> None:
    model = models.double("llama")
    close(run(model, budget=900, page=4)[0], own(model, IDS))


def test_the_needle_is_read(induction: Model) -> None:
    """The page that holds what a copy needs is one of twenty-one, and two are read."""
    ids = repeated(40, 2)[None]
    plan = calibrate("quest", dict(budget=4, page=2, dense=0, recent=2), model=induction)
    logits = feed(induction, SegmentCache(induction, plan), ids, [44, *[1] * 36])
    assert torch.equal(logits[0, 44:-1].argmax(-1), ids[0, 45:])
