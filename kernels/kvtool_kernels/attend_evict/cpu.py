"""`attend_evict` on the CPU: one call of compiled loops, in which a thread that is done with a head's attention scores
its entries and closes them up while they are still near."""

from __future__ import annotations

import torch

from kvtool_kernels._native.record import FEW, LANES, served
from kvtool_kernels.attend.cpu import scored
from kvtool_kernels.attend_evict import reference
from kvtool_kernels.attend_evict.reference import Evicted
from kvtool_kernels.scoring import SOFTMAX, Scoring

LEAST = 128  # logits of a query head from which on it is worth the import


def attend_evict(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor | None,
    *,
    scale: float,
    free: tuple[int, int],
    softcap: float | None = None,
    scoring: Scoring = SOFTMAX,
    nearest: bool = False,
) -> Evicted:
    """As `reference.attend_evict`; what comes after attention is done as there for few logits, soft caps, other dtypes
    and narrow heads."""
    noise, past = scoring.noise, scoring.past
    tensors = (q, k, v, *(x for x in (before, past) if x is not None), *noise)
    dense = all(x.dtype == torch.float32 and x.stride(-1) == 1 for x in tensors)
    whole = k.shape[3] == v.shape[3] and k.shape[3] % LANES == 0 and q.shape[1] // k.shape[1] <= FEW
    smooth = len({x.stride(0) for x in noise}) <= 1 and not (noise and past is not None)
    logits = k.shape[2] * (1 if past is None else 1 + past.shape[2])
    if not (dense and whole and smooth and softcap is None and logits >= LEAST and served(q, k, v)):
        out, lse, seen = scored(q, k, v, scale=scale, softcap=softcap)
        return reference.evicted(
            (out, lse), seen, q, k, v, before, scale=scale, softcap=softcap, free=free, scoring=scoring, nearest=nearest
        )
    from kvtool_kernels._native import launch_evicting  # only where it pays: Numba is slow to import

    return launch_evicting.attend_evict(q, k, v, before, scale=scale, free=free, scoring=scoring, nearest=nearest)
