"""The definition of `hadamard`: multiplication with the Sylvester matrix.

    y = x · H / √D,   H_1 = [1],   H_2n = [[H_n, H_n], [H_n, −H_n]]

H is symmetric and orthogonal up to √D, so that the transform is its own inverse. Arithmetic is fp32. On a CPU one
product with the D×D matrix beats log D passes of additions at the head dims in use, so that there is no twin.
"""

from __future__ import annotations

import functools

import torch


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., D], D a power of two → the same shape and dtype."""
    width = x.shape[-1]
    if width < 1 or width & width - 1:
        raise ValueError(f"the Sylvester matrix exists for powers of two, not for {width} channels")
    return (x.float() @ sylvester(width, x.device)).to(x.dtype)


@functools.lru_cache(maxsize=16)
def sylvester(width: int, device: torch.device) -> torch.Tensor:
    """H / √D, fp32 [D,D]."""
    with torch.inference_mode(False):  # what is kept between calls must serve autograd too
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while len(matrix) < width:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / width**0.5
