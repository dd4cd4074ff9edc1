"""Hulls, and bytes dealt by slope against every way to deal them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvtool.errors import InputError
from kvtool.measuring.allocation import allocate, hull
from tests.tolerance import close

SIZE = torch.tensor([4.0, 1.0, 2.0, 3.0, 3.0, 8.0]).double()
ERROR = torch.tensor([1.0, 9.0, 5.0, 4.5, 7.0, 1.0]).double()


def test_the_hull_leaves_out_what_costs_more_and_what_a_mixture_beats() -> None:
    assert hull(SIZE, ERROR) == [1, 2, 0]  # 3 lies above the line from 2 to 0, 4 above 3, and 5 costs more than 0


def test_the_hull_of_one_way_and_of_equals() -> None:
    assert hull(SIZE[:1], ERROR[:1]) == [0]
    assert hull(SIZE[[0, 0]], ERROR[[0, 0]]) == [0]


def units(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Four units of three to five ways; sizes are whole numbers, some errors do not fall with size."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(3, 6, (4,), generator=draw).tolist()
    sizes = [torch.randint(1, 12, (count,), generator=draw).double() for count in counts]
    return sizes, [torch.rand(count, generator=draw).double() / size for count, size in zip(counts, sizes, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_of_the_same_bytes_errs_less(seed: int) -> None:
    size, error = units(seed)
    least = sum(float(each.min()) for each in size)
    every = [
        tuple(sum(float(curve[way]) for curve, way in zip(curves, ways, strict=True)) for curves in (size, error))
        for ways in product(*(range(len(each)) for each in size))
    ]
    whole = allocate(size, error, 1e9)
    for spent, total in whole.path.tolist():  # every point of the path is a corner of the best curve
        close(torch.tensor(total).double(), torch.tensor(min(e for s, e in every if s <= spent + 1e-9)).double())
    largest = float((whole.path[:-1, 1] - whole.path[1:, 1]).max())  # the step that rounding down may cost
    for budget in (least, least + 3, least + 7.5):
        made = allocate(size, error, budget)
        assert made.spent <= budget
        assert made.error <= min(e for s, e in every if s <= budget) + largest


def test_steps_that_do_not_fit_are_passed_over() -> None:
    size = [torch.tensor([1.0, 10.0]).double(), torch.tensor([1.0, 2.0]).double()]
    error = [torch.tensor([90.0, 0.0]).double(), torch.tensor([1.0, 0.0]).double()]
    assert allocate(size, error, 5.0).choice.tolist() == [0, 1]
    assert allocate(size, error, 11.0).choice.tolist() == [1, 0]


def test_a_budget_below_the_cheapest() -> None:
    with pytest.raises(InputError, match="below what the cheapest"):
        allocate([SIZE], [ERROR], 0.5)
