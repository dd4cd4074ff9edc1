"""The definition of `merge`: two partial attention results over disjoint entries become the result over their union.

    lse = log(exp(lse1) + exp(lse2));   out = exp(lse1 − lse) · out1 + exp(lse2 − lse) · out2

Exact, associative, commutative, with neutral element (0, −inf). Arithmetic is fp32 at least, whatever the outputs'
dtype.
"""

from __future__ import annotations

import torch

from kvtool_kernels.precision import wide

Partial = tuple[torch.Tensor, torch.Tensor]


def merge(a: Partial, b: Partial) -> Partial:
    """(out [..., D], lse [...]) twice → the same; shapes must agree."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    return (weight_a * wide(out_a) + weight_b * wide(out_b)).to(out_a.dtype), lse
