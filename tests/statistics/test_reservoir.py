"""The bounded sample: merging neither doubles a block nor loses one while there is room, and order does not matter."""

from __future__ import annotations

import copy

import pytest

from kvtool.corpus.base import Sample, gather
from kvtool.model import Model
from kvtool.statistics._base import Statistic
from kvtool.statistics.reservoir import BLOCKS, FREE, TOKENS
from tests.models import random_ids
from tests.statistics.naive import written_down
from tests.statistics.observed import trace
from tests.tolerance import close, same

SAMPLES = [Sample(random_ids(1, 2 * TOKENS + seed, seed=seed)[0], "text") for seed in range(9)]


def sampled(model: Model, which: list[int]) -> Statistic:
    corpus = gather("text", [SAMPLES[index] for index in which], seed=0, options={})
    return trace(model, {"text": corpus}, ["reservoir"])["reservoir"]


def held(statistic: Statistic) -> list[int]:
    return [priority for priority in statistic["priority"].tolist() if priority != FREE]


@pytest.mark.parametrize(
    ("first", "second", "blocks"),
    [
        ([0], [1], 4),
        ([0, 1], [1, 2], 6),
        ([0, 1, 2, 3], [0, 1, 2, 3], 8),
        ([0], [0], 2),
        (list(range(5)), [4, 5, 6, 7, 8], 8),
    ],
    ids=["apart", "sharing", "the same, full", "the same", "more than fit"],
)
def test_no_block_twice(first: list[int], second: list[int], blocks: int, llama: Model) -> None:
    for a, b in ((first, second), (second, first)):
        merged = copy.deepcopy(sampled(llama, a))
        merged.merge(sampled(llama, b))
        union = sampled(llama, sorted({*first, *second}, reverse=True))
        assert held(merged) == sorted(set(held(merged)))
        assert len(held(merged)) == min(blocks, BLOCKS)
        for name in merged.rules:
            same(merged[name], union[name])


def test_blocks_are_what_they_say(llama: Model) -> None:
    statistic = sampled(llama, [0, 1])
    layers = {index: written_down(llama, SAMPLES[index].tokens) for index in (0, 1)}
    found = set()
    for place in range(4):
        start = int(statistic["position"][place])
        for index, records in layers.items():
            if (statistic["k"][place, 1] - records[1].k[:, start : start + TOKENS]).abs().max() < 1e-4:
                close(statistic["q"][place, 2], records[2].q[:, start : start + TOKENS])
                close(statistic["v"][place, 0], records[0].v[:, start : start + TOKENS])
                found.add((index, start))
    assert found == {(0, 0), (0, TOKENS), (1, 0), (1, TOKENS)}
