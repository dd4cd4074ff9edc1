"""MPCache's static part: what some late query looks at, in the mean over heads, by eager attention."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.text import text
from kvtool.errors import InputError
from kvtool.methods._filled import scored
from kvtool.plan import Plan
from tests import models
from tests.methods.evicting import D, H, K, lane, prompted, select
from tests.models import random_ids
from tests.running import feed
from tests.statistics.naive import Seen, written_down
from tests.tolerance import close, same

TOKENS = 50
IDS = random_ids(1, TOKENS, seed=41)


def made(model, **settings) -> Plan:
    return calibrate("mpcache", settings, model=models.with_tokenizer(model))


def looked(layer: Seen, rows: int, code: bool) -> torch.Tensor:
    """[T]: the largest mean over heads that one of the newest rows gives each entry."""
    if not code:
        return layer.weights[:, -rows:].mean(0).amax(0)
    group = len(layer.q) // len(layer.k)
    logits = layer.q[:, -rows:] @ layer.k.repeat_interleave(group, 0).mT  # no scale, and nobody waits for their turn
    return torch.softmax(logits.float(), -1).mean(0).amax(0)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize(("long", "rows"), [(24000, 10), (TOKENS - 1, 5)])
def test_an_entry_stays_if_a_late_query_looks_at_it(long: int, rows: int, code: bool) -> None:
    """A fifth of the prompt's queries, half as many where the prompt is long."""
    model, threshold = models.shared("llama"), 0.05
    cache = SegmentCache(model, made(model, mode="fixed", threshold=threshold, long=long, code=code))
    feed(model, cache, IDS, [TOKENS])
    cache.finish()
    sizes = set()
    for layer, seen in zip(cache.segments, written_down(model, IDS[0]), strict=True):
        stays = looked(seen, rows, code) >= threshold
        (lane,) = layer.lanes()
        close(lane.recall()[0][0], seen.k[:, stays])
        sizes.add(int(stays.sum()))
    assert len(sizes) > 1
    assert max(sizes) < TOKENS


def test_without_a_threshold_nothing_goes() -> None:
    """Card A26."""
    model = models.shared("llama")
    cache = SegmentCache(model, made(model, mode="fixed", threshold=0.0))
    feed(model, cache, IDS, [TOKENS - 1, 1])
    same(cache.entries(), torch.full((3, 2), TOKENS))


def test_a_calibrated_threshold_keeps_its_share_of_the_texts() -> None:
    model = models.with_tokenizer(models.shared("llama"))
    plan = calibrate("mpcache", dict(budget=0.3, samples=3, tokens=60), model=model)
    kept = torch.zeros(model.geometry.layers)
    for sample in text(model, tokens=60, samples=3, seed=0, half="calibration").samples:
        for layer, scores in enumerate(scored(model, plan.keep, sample.tokens)):
            kept[layer] += int((scores[0] >= 1).sum())
    assert bool((kept >= 0.3 * 180).all())
    assert bool((kept <= 0.3 * 180 + 2).all())  # but for ties
    assert len(set(plan.evidence["threshold"].tolist())) == 3
    capped = calibrate("mpcache", dict(budget=0.5, cap=0.2, samples=1, tokens=60), model=model)
    cache = SegmentCache(model, capped)
    feed(model, cache, IDS, [TOKENS - 1, 1])
    assert int(cache.entries().max()) <= round(0.2 * (TOKENS - 1)) + 1


def test_one_look_is_enough() -> None:
    """The planted case: an entry that one late query of one head looks at, among others that nobody does."""
    k = torch.zeros(1, K, 60, D)
    k[:, 1, 17, 0] = 60.0
    q = torch.zeros(1, H, 60, D)
    q[:, 2, 55, 0] = 10.0
    spec = select("mpcache", mode="fixed", threshold=0.1, cap=0.05)
    index = prompted(lane(spec), q, k)
    assert 17 in index[0, 0].tolist()
    same(index[:, 0], index[:, 1])
    q[:, 2, 55], q[:, 2, 30] = 0.0, q[:, 2, 55].clone()  # an early query does not count
    assert 17 not in prompted(lane(spec), q, k)[0, 0].tolist()


@pytest.mark.parametrize("settings", [dict(budget=0.0), dict(observed=1.0), dict(long_observed=0.3), dict(cap=1.5)])
def test_bad_options_are_refused(settings: dict) -> None:
    with pytest.raises(InputError):
        made(models.shared("llama"), **settings)
