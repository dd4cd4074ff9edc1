"""The one tolerance table, by dtype. Copies, gathers, permutations and packing are exact: compare those with `same`."""

from __future__ import annotations

import torch

# dtype: (absolute, relative)
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 2e-2),
}


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal within the tolerance of `dtype` (of `actual` unless told); NaN equals nothing."""
    absolute, relative = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual, expected, atol=absolute, rtol=relative, check_dtype=False)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit."""
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((actual.float() - expected.float()).abs().max())
