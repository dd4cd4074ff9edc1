"""Law 8: composing with a lossless plan changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from kvtool.records import alike
from kvtool.slots import Documents, Prefill, Read
from tests.laws.methods import LOSSLESS, TINY, lossless, tiny
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import same

NOTHING_LOST = [case for case in LOSSLESS if case in ("razor-0", "duo-0")]  # by their heads, not by their window's size


def executes_alike(first: Plan, second: Plan, model: Model) -> None:
    ids = random_ids(1, 24, seed=13)
    outs = [feed(model, SegmentCache(model, plan), ids, [12, *[1] * 12]) for plan in (first, second)]
    same(*outs)


@pytest.mark.parametrize("other", [None, *NOTHING_LOST])
@pytest.mark.parametrize("case", TINY)
def test_a_lossless_plan_is_neutral(case: str, other: str | None, llama: Model) -> None:
    mine = tiny(case, llama.name)
    neutral = Plan("none", llama.fingerprint) if other is None else lossless(other, llama.name)
    for made in (compose(mine, neutral), compose(neutral, mine)):
        assert made.method == mine.method
        assert made.slots == mine.slots
        assert all(getattr(made, slot) is getattr(mine, slot) for slot, filled in mine.slots.items() if filled)
        assert made.model == mine.model
        executes_alike(made, mine, llama)


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("other", NOTHING_LOST)
def test_the_evidence_and_options_of_both_survive(case: str, other: str, llama: Model) -> None:
    mine, neutral = tiny(case, llama.name), lossless(other, llama.name)
    made = compose(mine, neutral)
    kept = list(made.evidence.values())
    for array in (*mine.evidence.values(), *neutral.evidence.values()):
        assert any(array is candidate for candidate in kept)
    assert mine.options in made.options.values()
    assert neutral.options in made.options.values()


def test_two_lossy_plans_for_one_slot_are_refused(llama: Model) -> None:
    with pytest.raises(InputError, match="two plans fill the slot 'keep'"):
        compose(tiny("duo-0", llama.name), tiny("streaming-0", llama.name))


def test_parts_of_a_reading_that_say_nothing_or_the_same_are_neutral(llama: Model) -> None:
    """Documents at temperature and scale 1, and a prompt read whole, are what a cache does by itself."""
    ones, half = torch.ones(llama.geometry.layers), torch.full((llama.geometry.layers,), 0.5)
    plain, sharp = Documents(ones, ones), Documents(half, ones)
    whole, few = Prefill(ones, unit=4), Prefill(half, unit=4)

    def plan(**parts: object) -> Plan:
        return Plan("parts", llama.fingerprint, read=Read(ones, **parts))  # type: ignore[arg-type]

    for mine, theirs in (
        (dict(documents=sharp, prefill=whole), dict(documents=plain, prefill=few)),
        (dict(documents=plain, prefill=few), dict(documents=sharp, prefill=whole)),
        (dict(documents=sharp, prefill=few), dict(documents=Documents(half.clone(), ones), prefill=few)),
    ):
        made = compose(plan(**mine), plan(**theirs)).read
        assert made is not None
        assert made.documents is not None
        assert made.prefill is not None
        assert alike(made.documents, sharp)
        assert alike(made.prefill, few)
    chosen = Read(half, documents=plain)
    made = compose(replace(plan(), read=chosen), plan(documents=sharp, prefill=whole)).read
    assert made is not None
    assert made.chooses
    assert made.documents is sharp
    for other in (dict(documents=Documents(half, half)), dict(prefill=Prefill(half, unit=8))):
        with pytest.raises(InputError, match="two plans fill the slot 'read'"):
            compose(plan(documents=sharp, prefill=few), plan(**other))
