"""The roads that are told lead where the answer says, and nowhere does a shorter search find that out."""

from __future__ import annotations

import re

import pytest

from kvtool.corpus.graph import TOWNS, graph
from kvtool.errors import InputError

pytestmark = pytest.mark.real


def roads(prompt):
    found = re.findall(r"A road leads from (\w+) to (\w+)\.", prompt)
    ways = {}
    for start, end in found:
        ways.setdefault(start, []).append(end)
    return ways


def ways(found, start, end):
    """All ways, by trying them."""
    if start == end:
        return [[]]
    return [[town, *rest] for town in found.get(start, []) for rest in ways(found, town, end)]


@pytest.mark.parametrize(("hops", "branches"), [(1, 1), (2, 3), (4, 2)])
def test_the_answer_is_the_only_way(demo, hops, branches):
    for sample in graph(demo, lengths=(900,), samples=3, hops=hops, branches=branches).samples:
        prompt = demo.tokenizer.decode(sample.tokens)
        found = roads(prompt)
        start, end = re.findall(r"From (\w+) to (\w+):", prompt)[-1]
        answer = demo.tokenizer.decode(sample.answer)
        assert ways(found, start, end) == [answer.strip().split(", ")]
        assert len(ways(found, start, end)[0]) == hops
        assert len(found[start]) == branches
        assert sum(map(len, found.values())) == 2 * hops * branches
        said = [demo.tokenizer.decode(sample.tokens[low:high]).strip() for low, high in sample.evidence]
        assert said == answer.strip().split(", ")


def test_the_worked_example_is_true_and_of_other_towns(demo):
    sample = graph(demo, lengths=(900,), samples=1).samples[0]
    prompt = demo.tokenizer.decode(sample.tokens)
    (start, end, way) = re.search(r"From (\w+) to (\w+): ([\w, ]+)\.", prompt).groups()
    assert ways(roads(prompt), start, end) == [way.split(", ")]
    assert not {start, *way.split(", ")} & set(demo.tokenizer.decode(sample.answer).strip().split(", "))


def test_no_town_is_named_twice():
    assert len(set(TOWNS)) == len(TOWNS)


@pytest.mark.parametrize("options", [{"samples": 0}, {"hops": 0}, {"branches": 0}, {"hops": 8, "branches": 4}])
def test_counts_out_of_range_are_refused(demo, options):
    with pytest.raises(InputError, match=f"{len(TOWNS) // 2 - 1} roads or fewer"):
        graph(demo, **options)
