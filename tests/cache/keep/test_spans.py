"""Spans between markers: by hand, and against a parser that walks through the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.cache.keep.spans import inside, numbered, spellings
from kvtool.errors import InputError
from tests import models

OPEN, CLOSE = ((1, 2), (7,)), ((3,), (4, 5))  # two spellings each


def ints(mask: torch.Tensor) -> list[int]:
    return mask.int().tolist()


def test_markers_lie_inside_or_do_not() -> None:
    row = torch.tensor([9, 1, 2, 8, 8, 3, 9, 7, 8, 4, 5, 9])
    assert ints(inside(row, OPEN, CLOSE)) == [0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    assert ints(inside(row, OPEN, CLOSE, markers=False)) == [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert ints(numbered(row, OPEN, CLOSE)) == [0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0]


@pytest.mark.parametrize("markers", [True, False])
def test_open_ends(markers: bool) -> None:
    """A close without an open is no span; an open without a close is one to the end, or none."""
    row = torch.tensor([3, 9, 7, 8, 3, 3, 7, 8])
    first, rest = (1, [1, 1]) if markers else (0, [0, 1])
    assert ints(inside(row, OPEN, CLOSE, markers=markers)) == [0, 0, first, 1, first, 0, *rest]
    assert ints(inside(row, OPEN, CLOSE, markers=markers, unclosed=False)) == [0, 0, first, 1, first, 0, 0, 0]
    assert ints(inside(row[:5], OPEN, CLOSE, markers=markers, unclosed=False)) == [0, 0, first, 1, first]


def test_spans_in_spans_count_once() -> None:
    row = torch.tensor([7, 8, 7, 8, 3, 8, 3, 7, 3, 9])
    assert ints(numbered(row, OPEN, CLOSE)) == [1] * 7 + [2, 2, 0]
    assert ints(numbered(row, OPEN, CLOSE, markers=False)) == [0, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_one_marker_for_both_ends() -> None:
    row = torch.tensor([6, 8, 6, 9, 6, 8])
    assert ints(numbered(row, [(6,)], [(6,)])) == [1, 1, 1, 0, 2, 2]
    assert ints(inside(row, [(6,)], [(6,)], markers=False)) == [0, 1, 0, 0, 0, 1]


def test_shapes_and_short_rows() -> None:
    rows = torch.tensor([[[7, 8, 3], [8, 8, 8]], [[3, 3, 7], [1, 2, 3]]])
    assert ints(inside(rows, OPEN, CLOSE)) == [[[1, 1, 1], [0, 0, 0]], [[0, 0, 1], [1, 1, 1]]]
    assert inside(rows[..., :0], OPEN, CLOSE).shape == (2, 2, 0)
    assert ints(inside(rows[..., :1], OPEN, CLOSE)) == [[[1], [0]], [[0], [0]]]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([7, 3, 8]), max_size=20))
def test_a_parser_that_walks(row: list[int]) -> None:
    number, depth, expected = 0, 0, []
    for token in row:
        if token == 7:
            number += depth == 0
            depth += 1
        expected.append(number if depth else 0)
        if token == 3:
            depth = max(0, depth - 1)
    assert ints(numbered(torch.tensor(row, dtype=torch.int64), OPEN, CLOSE)) == expected


def test_spellings_of_a_marker() -> None:
    model = models.with_tokenizer(models.shared("llama"))
    assert spellings(model, "<a>") == (tuple(b"<a>"),)  # characters do not join
    with pytest.raises(InputError, match="empty marker"):
        spellings(model, " ")


def test_a_tokenizer_that_joins() -> None:
    """Its only word is the space and what follows it."""
    model = models.with_tokenizer(models.shared("llama"))

    class Joining(models.Characters):
        def __call__(self, text: str, add_special_tokens: bool = True):
            made = super().__call__(text, add_special_tokens)
            if text.startswith(" "):
                made.input_ids = [77, *made.input_ids[2:]] if len(text) > 1 else made.input_ids
            return made

    object.__setattr__(model, "tokenizer", Joining())
    assert spellings(model, "<a>") == (tuple(b"<a>"), (77, *b"a>"))
