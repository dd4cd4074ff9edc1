"""Copies are equal, ids are ordinary, and neither tokenizer nor model is needed."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.repeat import repeat
from kvtool.errors import InputError


def test_the_copies_are_equal(bare):
    for sample in repeat(bare, period=7, copies=5, samples=3).samples:
        assert len(sample.tokens) == sample.length == 35
        assert sample.period == 7
        assert torch.equal(sample.tokens.view(5, 7), sample.tokens[:7].expand(5, 7))


def test_ids_fill_the_vocabulary(bare):
    (sample,) = repeat(bare, period=5000, copies=1, samples=1).samples
    assert sample.tokens.unique().tolist() == list(range(97))


def test_a_size_is_as_good_as_a_model(bare):
    assert repeat(97).provenance == repeat(bare).provenance


def test_the_range_is_half_open():
    (sample,) = repeat(100, period=500, samples=1, low=10, high=13).samples
    assert sample.tokens.unique().tolist() == [10, 11, 12]


@pytest.mark.real
def test_control_tokens_are_left_out(demo):
    (sample,) = repeat(demo, period=2000, samples=1, high=40).samples
    controls = {token for token, entry in demo.tokenizer.added_tokens_decoder.items() if entry.special}
    assert controls
    assert not controls & set(sample.tokens.tolist())
    assert set(range(17, 40)) <= set(sample.tokens.tolist())


@pytest.mark.parametrize("bounds", [{"low": -1}, {"high": 101}, {"low": 50, "high": 50}])
def test_a_range_outside_the_vocabulary_is_refused(bounds):
    with pytest.raises(InputError, match=r"expected a part of \[0, 100\)"):
        repeat(100, **bounds)


@pytest.mark.parametrize("name", ["period", "copies", "samples"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} of the repeat corpus: got 0"):
        repeat(100, **{name: 0})
