"""Decode steps that are one operation against the same steps, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.cache.keep import fused
from kvtool.cache.keep.selector import Selector
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.lane import Step
from kvtool.slots import Select
from tests.laws.selections import CASES as SELECTIONS
from tests.tolerance import close, same

B, H, K, D = 2, 6, 2, 32
NAMES = ["step-sum", "step-newest", "step-decay", "step-pooled", "step-growing", "step-gumbel", "step-distance",
         "step-slack", "step-hybrid"]  # fmt: skip
SPLIT = dict(observe="all", reduce="sum", when="step", pick="split", settings={"newest": 0.5}, sink=2)
CASES: dict[str, dict[str, Any]] = {
    **{name: {k: v for k, v in SELECTIONS[name].items() if k != "share"} for name in NAMES},
    "window": dict(observed=8, recent=8, when="step", decay=0.0, pool="mean", kernel=15),
    "pooled-first": dict(observed=1, when="step", decay=0.5, pool="mean", kernel=3, group="max"),
    "alike": dict(observed=1, when="step", decay=0.0, recent=1, alike=True, sink=3),
    "past": dict(observed=8, history=8, recent=8, when="step", decay=0.0, pool="max", kernel=7),
    "past-few": dict(observed=5, history=3, recent=4, when="step", decay=0.6, pool="mean", kernel=3, group="max"),
    "past-slack": dict(observed=8, history=8, recent=9, when="step", decay=0.0, slack=4),
    "mixed": dict(SELECTIONS["step-hybrid"], decay=0.0, sink=3, recent=9),
    "split": SPLIT,
    "moving": dict(SPLIT, merge="moving", weigh="cosine"),
    "nearest": dict(SELECTIONS["step-merge"], count=False),
    "nearest-above": dict(observe="all", reduce="sum", when="step", merge="nearest", threshold=0.5, recent=3),
    "everything-stays": dict(observe="all", reduce="sum", when="step", recent=1000, sink=2),
    "anchored": dict(
        observe="all", pick="distance", settings={"distance": 5}, sink=2, recent=1, when="step", merge="anchored"
    ),
    "growing-distance": dict(
        observe="all", pick="distance", settings={"distance": 9}, sink=2, when="step", growing=True, alike=True
    ),
}
STEPS = 40


def lane(options: dict[str, Any], budget: float, *, stages: bool, prompt: tuple[torch.Tensor, ...]) -> Thinned:
    """A lane after a prompt."""
    spec = Select(torch.full((1, K), budget), **options)
    made = Thinned([0, 1], selector=Selector(spec, [budget] * K, 0, [0, 1]))
    if stages:
        made.simple = made.scoring = False
    step = Step(0, D**-0.5)
    made.step(*prompt, step)
    made.selector.prompt_length = prompt[1].shape[2]
    view = made.view(step)
    scores = made.selector.scores(view)
    made.thin(view, scores, made.selector.limits(prompt[1].shape[2])[0], scores)
    made.finish()
    return made


@pytest.mark.parametrize(("entries", "dtype"), [(60, torch.float64), (700, torch.float32)])
@pytest.mark.parametrize("name", CASES)
def test_the_same_stays(name: str, entries: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> tuple[torch.Tensor, ...]:
        made = [torch.randn(B, heads, count, D, generator=draw) for heads in (H, K, K)]
        return tuple(x.to(dtype) for x in made)

    prompt = tokens(entries)
    mine, theirs = (lane(CASES[name], 0.5, stages=stages, prompt=prompt) for stages in (False, True))
    assert mine.scoring or (mine.simple and mine.selector.blind)
    made_of_kept_ones = CASES[name].get("merge", "drop") in ("drop", "anchored")
    for at in range(STEPS):
        q, k, v = tokens(1)
        step = Step(entries + at, D**-0.5)
        for actual, expected in zip(mine.step(q, k, v, step), theirs.step(q, k, v, step), strict=True):
            close(actual, expected)
        for actual, expected in zip(mine.recall()[:2], theirs.recall()[:2], strict=True):
            (same if made_of_kept_ones else close)(actual, expected)
        assert (mine.selector.running is None) == (theirs.selector.running is None)
        if mine.selector.running is not None:
            close(mine.selector.running, theirs.selector.running)
        for buffer in mine.selector.buffers():  # no view into something larger
            assert buffer.untyped_storage().nbytes() == buffer.nbytes
        assert (mine.selector.turn, mine.selector.limit) == (theirs.selector.turn, theirs.selector.limit)
        assert mine.selector.first == theirs.selector.first
        for actual, expected in zip(mine.selector.queries, theirs.selector.queries, strict=True):
            same(actual, expected)
        assert mine.selector.memory.keys() == theirs.selector.memory.keys()
        for actual, expected in zip(mine.selector.memory.values(), theirs.selector.memory.values(), strict=True):
            close(actual, expected, dtype)
    assert mine.entries() < entries + STEPS  # something left


def test_sinks_beyond_the_budget_stay() -> None:
    """2 entries of 8 are asked for, 6 of which are sinks: what comes stays until all sinks are there."""
    draw = torch.Generator().manual_seed(3)
    options = dict(CASES["growing-distance"], sink=6, recent=1)
    prompt = tuple(torch.randn(B, heads, 8, D, generator=draw) for heads in (H, K, K))
    mine, theirs = (lane(options, 0.25, stages=stages, prompt=prompt) for stages in (False, True))
    for at in range(12):
        q, k, v = (torch.randn(B, heads, 1, D, generator=draw) for heads in (H, K, K))
        for each in (mine, theirs):
            each.step(q, k, v, Step(8 + at, D**-0.5))
        for actual, expected in zip(mine.recall()[:2], theirs.recall()[:2], strict=True):
            same(actual, expected)
    assert mine.entries() == 6


def test_it_is_the_one_operation_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the stages, on any of the steps."""
    draw = torch.Generator().manual_seed(3)
    prompt = tuple(torch.randn(B, heads, 50, D, generator=draw) for heads in (H, K, K))
    made = lane(CASES["step-sum"], 0.5, stages=False, prompt=prompt)
    turns = []
    monkeypatch.setattr(fused, "turn", lambda *args, run=fused.turn: turns.append(1) or run(*args))
    monkeypatch.setattr(made, "evict", None)
    for at in range(5):
        made.step(*(torch.randn(B, heads, 1, D, generator=draw) for heads in (H, K, K)), Step(50 + at, D**-0.5))
    assert len(turns) == 5


@pytest.mark.parametrize(
    "options",
    [
        dict(SELECTIONS["step-merge"]),
        dict(SELECTIONS["step-history"], recent=0.5),
        dict(SELECTIONS["step-history"], reduce="max"),
        dict(SELECTIONS["step-counts"]),
        dict(SELECTIONS["step-norms"]),
        dict(SELECTIONS["step-hybrid"], alike=False),
        dict(SELECTIONS["step-newest"], weights=torch.ones(1, H)),
        dict(SELECTIONS["step-newest"], pool="max", kernel=3, group_first=True),
        dict(SELECTIONS["last"]),
    ],
)
def test_what_goes_through_the_stages(options: dict[str, Any]) -> None:
    spec = Select(torch.full((1, K), 0.5), **options)
    made = Thinned([0, 1], selector=Selector(spec, [0.5] * K, 0, [0, 1]))
    assert not made.scoring
