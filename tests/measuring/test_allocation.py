"""Hulls, and bytes dealt by slope against every way to deal them."""

from __future__ import annotations

from itertools import count, product

import pytest
import torch

from kvtool.errors import InputError
from kvtool.measuring.allocation import Each, Either, Unit, Ways, allocate, corners, deal, hull
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


def leaves(draw: torch.Generator, names: count[int]) -> Ways:
    size = torch.randint(1, 12, (3,), generator=draw).double()
    return Ways(next(names), size, torch.rand(3, generator=draw).double() / size)


def trees(seed: int) -> list[Unit]:
    """Two groups of two layers with two leaves each, of which the second may be taken as one with two leaves, and the
    first only if a pair within it, in turn, is not."""
    draw, names = torch.Generator().manual_seed(seed), count()
    pairs: list[Unit] = [Each((leaves(draw, names), leaves(draw, names))) for _ in range(3)]
    nested = Either((Each((Either((pairs[0], leaves(draw, names))), leaves(draw, names))), leaves(draw, names)))
    return [nested, Either((Each((pairs[1], pairs[2])), Each((leaves(draw, names), leaves(draw, names)))))]


def choices(unit: Unit) -> list[tuple[float, float, dict[int, int]]]:
    """Everything that may be chosen."""
    if isinstance(unit, Ways):
        points = zip(unit.size.tolist(), unit.error.tolist(), strict=True)
        return [(size, error, {unit.name: way}) for way, (size, error) in enumerate(points)]  # type: ignore[dict-item]
    if isinstance(unit, Either):
        return [choice for part in unit.parts for choice in choices(part)]
    found = []
    for each in product(*map(choices, unit.parts)):
        picks = {name: way for _, _, part in each for name, way in part.items()}
        found.append((sum(size for size, _, _ in each), sum(error for _, error, _ in each), picks))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_in_a_tree_errs_less_at_its_bytes(seed: int) -> None:
    units = trees(seed)
    every = choices(Each(tuple(units)))
    whole = deal(units, 1e9)
    for spent, total in whole.path.tolist():
        assert total == pytest.approx(min(e for s, e, _ in every if s <= spent + 1e-9))
    for budget in (whole.path[0, 0].item() + 2, whole.path[:, 0].mean().item()):
        made = deal(units, budget)
        same = [choice for choice in every if choice[2] == made.picks]
        assert len(same) == 1  # what was picked is one of the choices, and weighs what it is said to
        assert same[0][:2] == pytest.approx((made.spent, made.error))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_equally_steep_is_climbed_all_the_way(seed: int) -> None:
    """Parts whose curves are the same, so that steps are as steep as one another but for rounding."""
    draw, names = torch.Generator().manual_seed(seed), count()

    def few() -> torch.Tensor:
        return torch.tensor([0.1, 0.3, 1 / 3, 0.7, 1.1]).double()[torch.randint(5, (2,), generator=draw)]

    curves = [((few() + 1 / 7).cumsum(0), (few() + 1 / 7).cumsum(0).flip(0)) for _ in range(2)]
    parts = [Ways(next(names), *curves[at]) for at in torch.randint(2, (10,), generator=draw).tolist()]
    made = deal([Either((Each(tuple(parts[:6])),)), Each(tuple(parts[6:]))], 1e9)
    assert made.error == pytest.approx(sum(float(part.error.min()) for part in parts))


def test_a_shared_way_between_two_corners() -> None:
    """Worth it where it lies below the line between what the parts can do, and not above it."""

    def taken(error: float) -> list[bool]:
        parts = [
            Ways(name, torch.tensor([1.0, 3.0]).double(), torch.tensor([4.0, 0.0]).double()) for name in ("one", "two")
        ]
        shared = Ways("both", torch.tensor([3.0]).double(), torch.tensor([error]).double())
        return ["both" in corner.picks for corner in corners(Either((Each((parts[0], parts[1])), shared)))]

    assert taken(7.0) == [False, False]  # from 8 at 2 bytes straight down to 0 at 6
    assert taken(5.0) == [False, True, False]
