"""Known answers of SparF, card C10; its tail and its scores are in tests/cache/read/test_reader.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from tests import models
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error

IDS, CHUNKS = random_ids(1, 60, seed=5), [50, *[1] * 10]


def run(model: Model, **settings: object) -> tuple[torch.Tensor, SegmentCache]:
    cache = SegmentCache(model, calibrate("sparf", dict(budget=4, recent=1) | settings, model=model))
    return feed(model, cache, IDS, CHUNKS), cache


def constant() -> Model:
    """Keys differ, values do not, whatever the token."""
    model = models.build("mha")
    for layer in model.network.model.layers:
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(1)))
        layer.self_attn.v_proj.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(("budget", "channels"), [(2, 1), (3, 0.5), (9, 8)])
def test_mass_is_conserved(budget: int, channels: float) -> None:
    """Constant values give constant outputs, whatever is read and by which channels."""
    model = constant()
    for tail in ("mean", "drop"):
        close(run(model, budget=budget, channels=channels, tail=tail)[0], own(model, IDS))


def test_all_channels_choose_by_the_logits() -> None:
    """Nothing is left for the temperature to correct; fewer channels choose otherwise."""
    model = models.double("llama")
    plan = calibrate("sparf", dict(budget=4, channels=8, recent=1), model=model)
    assert plan.read is not None
    exact = replace(plan, read=replace(plan.read, rank=0))
    logits = feed(model, SegmentCache(model, exact), IDS, CHUNKS)
    close(run(model, channels=8)[0], logits)
    assert error(run(model, channels=2)[0], logits) > 1e-2


@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages_are_read_whole(page: int) -> None:
    """Never fewer bytes than the entries' own; as many if these fill their pages, as pages of one entry do."""
    model = models.shared("mha")
    _, cache = run(model, budget=8, channels=2, page=page, heads="max")
    plain = run(model, budget=8, channels=2, page=1, heads="max")[1].read_bytes
    assert cache.read_bytes == plain if page == 1 else cache.read_bytes > plain
    entry, bulk, heads = 2 * 4 * 8, 59, 6
    exact = 3 * heads * (bulk * 2 * 4 + 8 * entry + 8 * 4 + entry)  # channels, entries, the mean value, the recent one
    assert plain == exact


def test_the_needle_is_read(induction: Model) -> None:
    """One entry of forty is what a copy needs; the query's largest channels find it."""
    ids = repeated(40, 2)[None]
    plan = calibrate("sparf", dict(budget=2, channels=0.5, recent=1), model=induction)
    logits = feed(induction, SegmentCache(induction, plan), ids, [44, *[1] * 36])
    assert torch.equal(logits[0, 44:-1].argmax(-1), ids[0, 45:])


def test_more_channels_than_there_are() -> None:
    with pytest.raises(InputError, match="more channels"):
        run(models.shared("llama"), channels=9)
