"""The Walsh–Hadamard transform: orthonormal, its own inverse, flat on single channels."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as sylvester

from kvtool_kernels import ops
from kvtool_kernels.hadamard.spec import SHAPES, inputs
from tests.kernels.twins import device, names, reference, twin
from tests.tolerance import close, same

define = reference("hadamard")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", names("hadamard"))
def test_twins(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(shape, dtype=dtype, device=device(name))
    close(twin("hadamard", name)(x), define(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_own_inverse_and_keeps_lengths(shape: tuple[int, ...]) -> None:
    x = inputs(shape)
    y = ops.hadamard(x)
    close(ops.hadamard(y), x)
    close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("width", [1, 2, 64, 128])
def test_the_matrix_is_that_of_scipy(width: int) -> None:
    close(ops.hadamard(torch.eye(width)), torch.tensor(sylvester(width), dtype=torch.float32) / width**0.5)


def test_a_single_channel_is_spread_evenly() -> None:
    same(ops.hadamard(torch.tensor([[0.0, 4.0, 0.0, 0.0]])), torch.tensor([[2.0, -2.0, 2.0, -2.0]]))


def test_products_are_kept() -> None:
    """Rotating queries and keys alike leaves their products."""
    q, k = inputs((3, 64), seed=1), inputs((5, 64), seed=2)
    close(ops.hadamard(q) @ ops.hadamard(k).T, q @ k.T)


def test_what_a_call_keeps_serves_autograd() -> None:
    with torch.inference_mode():
        ops.hadamard(torch.ones(1, 32))
    x = torch.ones(1, 32, requires_grad=True)
    ops.hadamard(x).square().sum().backward()
    close(x.grad, 2 * torch.ones(1, 32))


@pytest.mark.parametrize("width", [0, 3, 96])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        ops.hadamard(torch.zeros(2, width))
