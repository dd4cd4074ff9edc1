"""Known answers of LouisKV, card C7; jumps and segments themselves are in tests/cache/keep/test_runs.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.methods.louiskv import quantiles
from kvtool.plan import Plan
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same

IDS, CHUNKS = random_ids(1, 70, seed=8), [50, *[1] * 20]


def made(**settings: object) -> Plan:
    model = models.double("llama")
    options = dict(budget=0.3, unit=4, sink=1, recent=2, period=0) | settings
    return calibrate("louiskv", options, model=model, trace=observed(model, ("jumps",)))


def run(plan: Plan) -> tuple[torch.Tensor, SegmentCache]:
    cache = SegmentCache(models.double("llama"), plan)
    return feed(models.double("llama"), cache, IDS, CHUNKS), cache


def test_the_threshold_is_the_quantile_of_the_steps() -> None:
    count = torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    close(quantiles(count, 0.25), torch.tensor([0.0, 0.625]))
    close(quantiles(count, 0.75), torch.tensor([0.75, 0.875]))
    close(quantiles(count, 1.0), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_so_many_steps_choose_anew(rate: float) -> None:
    """On random tokens, as those that were calibrated on: the share of steps is that asked for, roughly."""
    _, cache = run(made(rate=rate))
    readers = [lane.reader for layer in cache.segments for lane in layer.lanes()]
    looks, asks = (sum(getattr(reader, name) for reader in readers) for name in ("looks", "asks"))
    assert rate / 3 < looks / asks < min(1.0, 2 * rate + 0.1)


def test_a_threshold_above_one_is_every_step() -> None:
    """The same entries, step by step, as clusters that are read by a choice of each step."""
    always = made(mode="fixed", tau=1.1)
    assert always.read is not None
    each = replace(always, read=replace(always.read, renew=False, period=1))
    same(*(run(plan)[0] for plan in (always, each)))


def test_nothing_is_fetched_between_jumps() -> None:
    _, never = run(made(mode="fixed", tau=-1.1))
    _, always = run(made(mode="fixed", tau=1.1))
    once = [lane.reader.looks for layer in never.segments for lane in layer.lanes()]
    assert once == [2] * 3  # two KV heads
    assert 0 < never.moved_bytes < always.moved_bytes
