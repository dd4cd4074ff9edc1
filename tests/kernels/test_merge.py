"""`merge` is exact, associative and commutative, with neutral element (0, −inf); its twins agree with it."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtool_kernels.merge.spec import SHAPES, inputs
from kvtool_kernels.ops import attend
from tests.kernels.twins import device, names, reference, twin
from tests.tolerance import close, same

Partial = tuple[torch.Tensor, torch.Tensor]
define = reference("merge")


def agree(actual: Partial, expected: Partial) -> None:
    close(actual[0], expected[0])
    empty = expected[1] == float("-inf")
    assert torch.equal(actual[1] == float("-inf"), empty)
    close(actual[1].masked_fill(empty, 0.0), expected[1].masked_fill(empty, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", names("merge"))
def test_twins(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = inputs(shape, 2, dtype=dtype, device=device(name))
    agree(twin("merge", name)(first, second), define(first, second))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_order_and_grouping(shape: tuple[int, ...]) -> None:
    expected = None
    for a, b, c in itertools.permutations(inputs(shape, 3)):
        for made in (define(define(a, b), c), define(a, define(b, c))):
            expected = expected or made
            agree(made, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_neutral_element(shape: tuple[int, ...]) -> None:
    (partial,) = inputs(shape, 1)
    neutral = (torch.zeros_like(partial[0]), torch.full_like(partial[1], float("-inf")))
    for made in (define(partial, neutral), define(neutral, partial)):
        same(made[0], partial[0])
        same(made[1], partial[1])
    both = define(neutral, neutral)
    same(both[0], neutral[0])
    same(both[1], neutral[1])


def test_the_merge_of_two_halves_is_the_whole() -> None:
    """In fp64, against one softmax over all entries."""
    torch.manual_seed(0)
    logits, values = 50 * torch.randn(3, 40, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    halves = [
        (torch.softmax(logits[:, part], -1) @ values[part], logits[:, part].logsumexp(-1))
        for part in (slice(0, 13), slice(13, 40))
    ]
    out, lse = define(*halves)
    close(out.float(), (torch.softmax(logits, -1) @ values).float())
    close(lse, logits.logsumexp(-1))


def test_equal_halves_give_their_mean() -> None:
    out, lse = define((torch.ones(2, 4), torch.zeros(2)), (3 * torch.ones(2, 4), torch.zeros(2)))
    close(out, 2 * torch.ones(2, 4))
    close(lse, torch.full((2,), 2.0).log())


def test_weights_are_fp32_whatever_the_outputs_are() -> None:
    (a, b) = inputs((1, 2, 63, 64), 2, dtype=torch.bfloat16)
    exact = define((a[0].float(), a[1]), (b[0].float(), b[1]))
    same(define(a, b)[0], exact[0].to(torch.bfloat16))


def test_no_entry_at_all() -> None:
    q, nothing = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 0, 8)
    out, lse = define(attend(q, nothing, nothing, scale=1.0), attend(q, nothing, nothing, scale=1.0))
    assert not bool(out.any())
    assert bool((lse == float("-inf")).all())
