"""Twins of `attend_evict` against its definition, and the definition against arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvtool_kernels import ops
from kvtool_kernels.attend_evict.spec import CASES, Case, inputs
from tests.kernels.twins import names, reference, twin
from tests.tolerance import close, same

define = reference("attend_evict")


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def compared(function, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Scores and results within the tolerance, what leaves and what stays exactly."""
    mine, given = inputs(case, dtype=dtype), inputs(case, dtype=dtype)
    (out, lse), scores, gone, near = function(**mine)
    expected, kept, left, likeness = define(**given)
    close(out, expected[0])
    close(lse, expected[1])
    close(scores, kept)
    assert (gone is None) == (left is None)
    if left is not None:
        same(gone, left)
    assert (near is None) == (likeness is None)
    if near is not None:
        close(near[0], likeness[0])
        same(near[1], likeness[1])
    for name in "kv":
        same(mine[name], given[name])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", names("attend_evict"))
def test_twins(name: str, case: Case, threads: int) -> None:
    compared(twin("attend_evict", name), case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    compared(ops.attend_evict, Case(entries=300, known=299, nearest=True), dtype)


@pytest.mark.parametrize("entries", [5, 300])
def test_of_equal_scores_the_oldest_free_one_leaves(entries: int) -> None:
    given = inputs(Case(entries=entries, size=0.0, low=2))
    before = given["k"].clone()
    _, scores, gone, _ = ops.attend_evict(**given)
    close(scores, torch.full_like(scores, 1 / entries))
    same(gone, torch.full_like(gone, 2))
    same(given["k"], before[:, :, [0, 1, *range(3, entries), 2]])


@pytest.mark.parametrize("entries", [5, 300])
def test_the_nearest_key_is_that_of_the_same_direction(entries: int) -> None:
    """Entry 2 leaves; entry 3 points its way, entry 0 against it, and the length of neither counts."""
    given = inputs(Case(entries=entries, size=0.0, low=2, nearest=True))
    given["k"][:, :, 3] = 0.01 * given["k"][:, :, 2]
    given["k"][:, :, 0] = -100 * given["k"][:, :, 2]
    _, _, _, (cosine, place) = ops.attend_evict(**given)
    close(cosine, torch.ones_like(cosine))
    same(place, torch.full_like(place, 2))


def test_nothing_is_near_where_nothing_leaves() -> None:
    for entries in (5, 300):
        assert ops.attend_evict(**inputs(Case(entries=entries, recent=entries, nearest=True)))[2:] == (None, None)


def test_a_pooled_score_is_that_of_its_neighbours() -> None:
    """All attention goes to entry 100 of 300: with a kernel of 3 its neighbours score a third of it, as it does."""
    given = inputs(Case(entries=300, kernel=3, heads=2, recent=300))
    given["k"].zero_()
    given["k"][:, :, 100] = 1e3 * given["q"][:, :, 0]
    _, scores, gone, _ = ops.attend_evict(**given)
    expected = torch.zeros(1, 2, 300)
    expected[:, :, 99:102] = 1 / 3
    close(scores, expected)
    assert gone is None


def test_heads_that_go_alike_lose_the_same_entry() -> None:
    for alike in (False, True):
        _, _, gone, _ = ops.attend_evict(**inputs(Case(kv_heads=3, heads=9, batch=2, alike=alike)))
        assert bool((gone == gone[:, :1]).all()) == alike
