"""The law of every statistic: the profile of A and B is the merge of their profiles, in any order and grouping."""

from __future__ import annotations

import copy
import functools

import pytest

from kvtool.corpus.base import Corpus, gather
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.profile import profile
from kvtool.statistics._base import Statistic
from kvtool.trace import Trace, statistic
from tests import models
from tests.corpora import KINDS
from tests.models import induction_model
from tests.statistics.observed import STATISTICS, kinds_known, trace
from tests.tolerance import close, same

MODELS = ("llama", "gemma3", "induction")
PARTS = ("a", "b", "c")


@functools.cache
def model(name: str) -> Model:
    return induction_model() if name == "induction" else models.shared(name)


def part(kind: str, which: str, name: str) -> Corpus:
    """Corpora of different samples; text long enough for three blocks of the reservoir a sample."""
    options = dict(tokens=200) if kind == "text" else {}
    return KINDS[kind](model(name), seed=PARTS.index(which) + 1, **options)


@functools.cache
def observed(name: str, which: str) -> Trace:
    """All statistics, each of the corpora of the parts in `which`, observed one after another."""
    corpora = {}
    for kind in KINDS:
        samples = [sample for letter in which for sample in part(kind, letter, name).samples]
        corpora[kind] = gather(kind, samples, seed=0, options={})
    return trace(model(name), corpora)


def merged(first: Statistic, second: Statistic) -> Statistic:
    result = copy.deepcopy(first)
    result.merge(second)
    return result


def equal(first: Statistic, second: Statistic) -> None:
    """Counts, extrema and samples exactly; sums up to the order of addition."""
    assert first.rules == second.rules
    for key, rule in first.rules.items():
        mine, theirs = first[key], second[key]
        assert mine.dtype == theirs.dtype
        if rule == "sum" and mine.is_floating_point() and type(first).merge is Statistic.merge:
            size = max(1.0, float(theirs.abs().max()))
            close(mine / size, theirs / size)
        else:
            same(mine, theirs)


def test_every_kind_has_a_tiny_corpus() -> None:
    assert kinds_known()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", STATISTICS)
def test_the_union_is_the_merge(which: str, name: str) -> None:
    a, b, both = (observed(name, parts)[which] for parts in ("a", "b", "ab"))
    assert any(float(tensor.double().abs().sum()) > 0 for tensor in a.state.values())  # it saw something
    equal(merged(a, b), both)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", STATISTICS)
def test_order_and_grouping_do_not_matter(which: str, name: str) -> None:
    a, b, c = (observed(name, letter)[which] for letter in PARTS)
    equal(merged(a, b), merged(b, a))
    equal(merged(merged(a, b), c), merged(a, merged(b, c)))
    equal(merged(merged(c, a), b), merged(merged(a, b), c))


@pytest.mark.parametrize("which", STATISTICS)
def test_a_fresh_one_is_neutral(which: str) -> None:
    a, zero = observed("llama", "a")[which], statistic(which)(model("llama"), model("llama").geometry)
    for result in (merged(a, zero), merged(zero, a)):
        for key in a.rules:
            same(result[key], a[key])


@pytest.mark.parametrize("which", STATISTICS)
def test_accumulators_do_not_grow_with_the_corpus(which: str) -> None:
    small, large = observed("llama", "a")[which], observed("llama", "ab")[which]
    assert {key: tensor.shape for key, tensor in small.state.items()} == {
        key: tensor.shape for key, tensor in large.state.items()
    }


@pytest.mark.parametrize("which", STATISTICS)
def test_merging_leaves_the_other_untouched(which: str) -> None:
    a, b = (copy.deepcopy(observed("llama", letter)[which]) for letter in "ab")
    before = {key: tensor.clone() for key, tensor in b.state.items()}
    a.merge(b)
    a.merge(copy.deepcopy(a))
    for key, tensor in before.items():
        same(b[key], tensor)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        copy.deepcopy(observed("llama", "a")["gram"]).merge(observed("gemma3", "a")["gram"])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_traces_merge_as_their_statistics_do(name: str) -> None:
    a, b = copy.deepcopy(observed(name, "a")), observed(name, "b")
    a.merge(b)
    union = observed(name, "ab")
    assert {kind: sorted(done) for kind, done in union.done.items()} == a.done
    for which in STATISTICS:
        equal(a[which], union[which])


def test_traces_refuse_shared_samples_and_other_models() -> None:
    a = copy.deepcopy(observed("llama", "a"))
    with pytest.raises(InputError, match="have seen the same"):
        a.merge(observed("llama", "ab"))
    with pytest.raises(InputError, match="different models"):
        a.merge(observed("gemma3", "b"))


def test_samples_seen_before_are_not_counted_again() -> None:
    again = copy.deepcopy(observed("llama", "a"))
    for name in STATISTICS:
        again[name].model = model("llama")
    profile(model("llama"), again, {kind: part(kind, "a", "llama") for kind in KINDS})
    for which in STATISTICS:
        equal(again[which], observed("llama", "a")[which])
