"""A few calibrated channels of every key: s(q, unit) = max over its entries of Σ_{c ∈ C} q_c · k_c  (Double Sparsity's
label cache, arXiv 2408.07092).

`table` int [K,n]: each KV head's channels in order of importance, of which the first `rank` are held. With `bits` they
are held in codes, with an affine range for each key:

    s = (max − min) / (2^bits − 1);   code = round((k_c − min) / s);   k̂_c = code · s + min      (max, min over c ∈ C)
"""

from __future__ import annotations

import torch

from kvtool.cache.read.summaries._base import Given, Parts, best
from kvtool.errors import InputError
from kvtool_kernels.ops import dequantize, quantize
from kvtool_kernels.packed import Packed

LOGIT = False


def _taken(x: torch.Tensor, given: Given) -> torch.Tensor:
    """The first `rank` calibrated channels of x [B,K,...,D]."""
    if given.table is None:
        raise InputError("the summary 'channels' needs its calibrated channels", expected="a plan with a table")
    order = given.table if not given.rank else given.table[:, : given.rank]
    index = order.to(x.device, torch.int64).reshape(1, len(order), *[1] * (x.dim() - 3), -1)
    return x.gather(x.dim() - 1, index.expand(*x.shape[:-1], -1))


def summarise(k: torch.Tensor, given: Given) -> Parts:
    labels = _taken(k, given)
    if not given.bits:
        return (labels,)
    width = labels.shape[4]
    if width % 8 or given.bits > 8:
        raise InputError(
            "labels cannot be held in codes", got=f"{width} channels of {given.bits} bits",
            expected="a multiple of 8 channels, and 8 bits at most",
        )  # fmt: skip
    made = quantize(labels.flatten(2, 3), bits=given.bits, group=width, layout="channel")
    assert made.zero is not None
    return tuple(part.unflatten(2, labels.shape[2:4]) for part in (made.codes, made.scale, made.zero))


def _labels(parts: Parts, given: Given) -> torch.Tensor:
    """[B,K,U,unit,r]."""
    if not given.bits:
        return parts[0]
    width = parts[0].shape[4] * 8 // given.bits
    codes, scale, zero = (part.flatten(2, 3) for part in parts)
    made = dequantize(Packed(codes, scale, zero, given.bits, width, "channel", width))
    return made.unflatten(2, parts[0].shape[2:4])


def score(q: torch.Tensor, parts: Parts, given: Given) -> torch.Tensor:
    return best(_taken(q, given), _labels(parts, given).to(q.dtype) if given.bits else parts[0])
