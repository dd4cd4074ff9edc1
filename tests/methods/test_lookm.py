"""Known answers of LOOK-M, card A20; its rules, entry by entry, are in tests/cache/keep/test_merging.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.keep.budgets._base import Ballot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.plan import Plan
from tests import models
from tests.methods.evicting import STEP, D, H, K, lane, random, select
from tests.methods.merging import merged
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error, same

OPEN, CLOSE = b"<image>", b"</image>"


def made(**settings: object) -> Plan:
    return calibrate("lookm", settings, model=models.with_tokenizer(models.double("llama")))


def prompt(before: int, inside: int, after: int) -> torch.Tensor:
    """Ids [1,T] of random letters, some of them between the markers."""
    words = random_ids(1, before + inside + after, seed=7)[0] % 26 + 97
    parts = words[:before], torch.tensor(list(OPEN)), words[before : before + inside], torch.tensor(list(CLOSE))
    return torch.cat([*parts, words[before + inside :]])[None]


def thinned(tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: object):
    """Keys, values and counts held, and the places kept, of a lane whose queries look nowhere."""
    entries, tags = k.shape[2], {"tokens": tokens[:, None].expand(-1, K, -1)}
    chooser = lane(select("lookm", **settings))
    chooser.observe(torch.zeros(1, H, entries, D), 0, k, v, STEP, tags)
    view, chooser.prompt_length = chooser.view(k, v, STEP, tags), entries
    scores = chooser.scores(view)
    limit = chooser.spec.rule("spread").deal([Ballot(view, scores, chooser.limits(entries), chooser.free(entries))])[0][
        0
    ]
    index = chooser.choose(view, scores, limit, scores)
    return merged(chooser.job(view, scores, torch.ones(k.shape[:3]), index)), index


def test_without_a_span_nothing_changes() -> None:
    model, ids = models.double("llama"), prompt(40, 0, 0)[:, :40]
    cache = SegmentCache(model, made())
    close(feed(model, cache, ids, [30, *[1] * 10]), own(model, ids), torch.float32)
    assert cache.entries().unique().tolist() == [40]


@pytest.mark.parametrize("merge", ["avg", "pivot", "weighted", "drop"])
def test_where_text_fills_the_budget_every_other_entry_goes(merge: str) -> None:
    """But for the recent ones; whatever becomes of them."""
    ids = prompt(20, 30, 20)  # 85 tokens, of which 8 are recent
    k, v = random(1, K, 85, D), random(1, K, 85, D)
    _, index = thinned(ids, k, v, heavy=0.1, recent=0.1, merge=merge)
    assert index[0, 0].tolist() == [*range(27), *range(57, 85)]


def test_a_larger_budget_keeps_the_best_of_the_spans() -> None:
    """Of queries that look nowhere, the oldest entries get the most."""
    ids = prompt(20, 30, 20)
    k = random(1, K, 85, D)
    _, index = thinned(ids, k, k, heavy=0.7, recent=0.1)
    count = round(0.8 * 85)
    assert index[0, 0].tolist() == [*range(27 + count - 55), *range(57, 85)]


def test_copies_change_nothing_but_their_number() -> None:
    ids = prompt(20, 30, 20)
    k, v = random(1, K, 85, D), random(1, K, 85, D)
    k[:, :, 27:57], v[:, :, 27:57] = k[:, :, 3:4], v[:, :, 3:4]
    for merge in ("avg", "pivot", "weighted"):
        (key, value, counts), index = thinned(ids, k, v, merge=merge)
        places = index[..., None].expand(-1, -1, -1, D)
        close(key, k.gather(2, places))
        close(value, v.gather(2, places))
        assert int(counts[0, 0, 3]) == 31


def test_the_span_that_text_repeats_lives_on_in_it() -> None:
    """A planted entry of a span, alike to one of the text: only where it is merged does its value move anything."""
    ids = prompt(20, 30, 20)
    k, v = random(1, K, 85, D), random(1, K, 85, D)
    k[:, :, 40] = 2 * k[:, :, 5]
    change = v.clone()
    change[:, :, 40] += 10.0
    for merge, share in (("avg", True), ("pivot", True), ("drop", False)):
        before, after = (thinned(ids, k, x, merge=merge)[0][1] for x in (v, change))
        moved = (after - before).abs().amax(-1)[0, 0]
        assert moved.nonzero().flatten().tolist() == ([5] if share else [])
        if share:
            number = int(thinned(ids, k, v, merge=merge)[0][2][0, 0, 5])
            close(moved[5], torch.tensor(10.0 / number / (2 if merge == "pivot" else 1)))


def test_entries_and_bytes_after_a_prompt() -> None:
    model = models.double("llama")
    ids = torch.cat([prompt(20, 30, 20), prompt(20, 10, 40)])
    cache = SegmentCache(model, made())
    out = feed(model, cache, ids, [80, *[1] * 5])
    assert cache.entries().unique().tolist() == [85 - 30]
    held = [[lane.entries() for layer in cache.segments for lane in layer.parts[row].lanes] for row in range(2)]
    assert {*held[0]} == {55}
    assert {*held[1]} == {75}  # rows by themselves
    assert error(out, own(model, ids)) > 1e-2


def test_markers_are_in_the_plan() -> None:
    plan = made(open=("<image>", "<doc>"), close=("</image>", "</doc>"))
    assert plan.keep is not None
    assert plan.keep.select is not None
    assert plan.keep.select.settings["open"] == (tuple(b"<image>"), tuple(b"<doc>"))
    same(plan.keep.select.budget, torch.full((3, 2), 0.2))


@pytest.mark.parametrize("settings", [dict(heavy=0.0, recent=0.0), dict(heavy=0.9, recent=0.2), dict(open=())])
def test_bad_options_are_refused(settings: dict) -> None:
    with pytest.raises(InputError):
        made(**settings)
