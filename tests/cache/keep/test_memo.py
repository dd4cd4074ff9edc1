"""Caches that adopt one prefill share what they observe of it: nothing that they hold or answer changes by it, what a
budget has a say in is never shared, and everybody is charged for what others made."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool.cache.keep import memo, scores
from kvtool.cache.keep.memo import LATER, PAID, Account, Key, Memo, Names, named
from kvtool.cache.keep.selector import Selector
from kvtool.cache.segment_cache import SegmentCache
from kvtool.plan import Plan
from kvtool.slots import Keep, Select
from tests import models
from tests.laws.methods import plan
from tests.laws.rows.keep import ROWS
from tests.running import feed
from tests.tolerance import same

MODEL = models.shared("llama")
IDS = torch.randint(0, models.VOCABULARY, (1, 42), generator=torch.Generator().manual_seed(5))
PROMPT = 40
WINDOWS = ("duo", "rlkv", "retrieval-heads", "llm-drop", "razor", "streaming")  # which score nothing, and may train
CASES = [f"{name}-{index}" for name, row in ROWS.items() for index in range(len(row.tiny)) if name not in WINDOWS]
ONE = Memo()  # of one prompt, for all methods: none may be handed what another scores differently


@functools.cache
def full() -> SegmentCache:
    """A prompt's full cache, of which all queries are known."""
    made = SegmentCache(MODEL)
    for layer in made.segments:
        layer.record = -1
    feed(MODEL, made, IDS[:, :PROMPT], [PROMPT])
    return made


def adopted(made: Plan, account: Account | None = None) -> tuple[SegmentCache, torch.Tensor]:
    """A cache of the plan, after the prompt and what follows, and the logits of that."""
    cache = SegmentCache(MODEL, made, prompt_length=PROMPT)
    cache.tell(IDS[:, PROMPT:])
    cache.adopt(full(), account)
    return cache, feed(MODEL, cache, IDS[:, PROMPT:], [1] * 2)


def half(made: Plan) -> Plan:
    """The same selection with half the budget."""
    assert made.keep is not None
    assert made.keep.select is not None
    budget = made.keep.select.budget
    budget = torch.where(budget <= 1, budget / 2, (budget / 2).ceil())
    return replace(made, keep=replace(made.keep, select=replace(made.keep.select, budget=budget)))


@functools.cache
def case(name: str) -> Plan:
    method, index = name.rsplit("-", 1)
    return plan(method, MODEL, ROWS[method].tiny[int(index)])


def selects(name: str) -> bool:
    """Does a cache of the plan select by score what it adopts?"""
    made = case(name)
    select = made.keep.select if made.keep is not None else None
    return made.dense and select is not None and select.when != "chunk"


@pytest.mark.parametrize("name", CASES)
def test_what_is_held_and_answered_is_the_same_bit_for_bit(name: str) -> None:
    """And a second budget scores nothing again."""
    made, known = case(name), 0
    if not selects(name):
        return
    for one in (made, half(made)):
        (alone, logits), account = adopted(one), ONE.account(named(one))
        assert account is not None
        mine, found = adopted(one, account)
        same(found, logits)
        assert torch.equal(mine.entries(), alone.entries())
        for buffer, other in zip(mine.buffers(), alone.buffers(), strict=True):
            same(buffer, other)
        assert known in (0, len(ONE.made))
        assert account.spared > 0 or not known
        known = len(ONE.made)


def test_methods_share_what_queries_pay() -> None:
    own = Memo()
    for name in ("h2o-0", "elastic-0", "d2o-0"):
        adopted(case(name), own.account(named(case(name))))
    assert sum(key[0] == "paid" for key in own.made) == MODEL.geometry.layers


def test_only_scores_are_held() -> None:
    adopted(case("h2o-0"), ONE.account(named(case("h2o-0"))))
    rows = MODEL.geometry.query_heads
    assert all(tensor.shape[1] <= rows and tensor.shape[2:] == (PROMPT,) for made in ONE.made.values()
               for tensor in made.value)  # fmt: skip


def test_no_scoring_reads_what_a_budget_decides() -> None:
    """`LATER` is in no key: a rule that read it would be handed what another budget scores."""
    sources = [path.read_text() for path in Path(scores.__file__).parent.glob("*.py")]
    stages = (Selector._reduced, Selector._grouped, Selector._pooled, Selector._observed, Selector._most)
    sources += [inspect.getsource(stage) for stage in stages]
    read = {name for source in sources for name in re.findall(r"spec\.(\w+)", source)}
    assert {"settings", "reduce", "kernel"} <= read  # it does find them
    assert not read & set(LATER)


OTHER: dict[str, Any] = {
    "budget": torch.full((3, 2), 0.25),
    "observe": "all", "score": "key-norm", "reduce": "max", "pool": "max", "group": "max", "when": "step",
    "weights": torch.ones(3, 6), "settings": {"window": 3}, "tables": {"mean": torch.ones(3)},
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Select)])
def test_every_setting_but_later_ones_tells_observations_apart(name: str) -> None:
    base = Plan("none", {}, keep=_kept())
    select = _kept().select
    assert select is not None
    value = getattr(select, name)
    if name in OTHER:
        value = OTHER[name]
    else:
        value = "other" if isinstance(value, str) else (value or 0) + 1
    object.__setattr__(select, name, value)
    changed = named(replace(base, keep=replace(base.keep, select=select)))  # type: ignore[type-var]
    assert (changed == named(base)) == (name in LATER)


def test_passes_are_told_apart_by_all_that_their_queries_attend_to() -> None:
    """A pass runs over what windows and layers before have left: such plans share scores of queries, but no passes."""
    windowed = _kept()
    windowed.recent[0, 0] = 7
    one, other = (named(Plan("none", {}, keep=keep)) for keep in (_kept(), windowed))
    assert one is not None
    assert other is not None
    assert one.rule == other.rule
    assert one.plan != other.plan


def _kept() -> Keep:
    everything = torch.ones(3, 2, dtype=torch.bool)
    return Keep.heads(everything, sink=0, recent=1, select=Select(torch.full((3, 2), 0.5)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(memo, "_now", lambda: now[0])
    return now


class Work:
    """Results that take a second each, and another one for what they are made of."""

    def __init__(self, own: Memo, now: list[float]):
        self.own, self.now, self.calls = own, now, 0

    def account(self) -> Account:
        made = self.own.account(Names("rule", "plan"))
        assert made is not None
        return made

    def once(self, account: Account, *key: str) -> torch.Tensor:
        def make() -> tuple[torch.Tensor, ...]:
            self.calls += 1
            self.now[0] += 1
            inner = [self.once(account, *key[1:])] if key[1:] else []
            return (sum(inner, torch.ones(2)),)

        wanted: Key = key
        return account._once(wanted, make)[0]


def test_everybody_is_charged_what_it_would_have_spent_alone(clock: list[float]) -> None:
    work = Work(Memo(), clock)
    first, second, third = (work.account() for _ in range(3))
    same(work.once(first, "b"), torch.ones(2))
    work.once(first, "a", "b")
    assert (first.spared, work.calls) == (0, 2)  # it had "b" already
    same(work.once(second, "a", "b"), torch.full((2,), 2.0))
    work.once(second, "b")
    work.once(second, "a", "b")
    assert (second.spared, work.calls) == (2, 2)
    work.once(third, "c", "b")
    assert (third.spared, work.calls) == (1, 3)  # "b" was another's, "c" is its own
    last = work.account()
    work.once(last, "c", "b")
    work.once(last, "a", "b")
    assert (last.spared, work.calls) == (3, 3)  # of which "b" counts once


def test_what_is_handed_out_may_be_changed(clock: list[float]) -> None:
    work = Work(Memo(), clock)
    for _ in range(3):
        found = work.once(work.account(), "a")
        same(found, torch.ones(2))
        found.zero_()


def test_what_failed_is_tried_again(clock: list[float]) -> None:
    work = Work(Memo(), clock)

    def fail() -> tuple[torch.Tensor, ...]:
        raise RuntimeError

    account = work.account()
    with pytest.raises(RuntimeError):
        account._once(("a",), fail)
    assert not work.own.made
    work.once(account, "a")
    assert work.calls == 1


def test_payments_are_told_apart_by_what_they_depend_on() -> None:
    assert set(PAID) <= {field.name for field in fields(Select)} - set(LATER)
