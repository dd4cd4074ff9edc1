"""Attention that queries yet to come are expected to pay, if queries before RoPE are Gaussian.

    q ~ N(μ, Σ) before RoPE;   R = mean rotation of the next `future` positions;   μ' = R μ,  Σ' = R Σ Rᵀ
    E exp(scale · q'·k_j) = exp(scale · μ'·k_j + scale² · k_jᵀ Σ' k_j / 2)
    a_j = that, over its sum;   s_j = (a_j + ε) · ‖v_j‖₂        (Expected Attention: Devoto et al., arXiv 2510.00636)

per query head. μ [L,H,D] and Σ [L,H,D,D] are the tables "mean" and "covariance", or those of the observed queries but
for the first `skip`. Settings: "future", "skip", "epsilon", and whether "covariance" and the value's "norm" count.
Entries that always stay in front take no part in the sum. The mean of the rotations stands on both sides of Σ, as
published, which leaves out that positions differ. Soft caps are left out too. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.rotary import Table
from kvtool_kernels.precision import wide

SEES = "queries"
NEEDS = ("positions",)


def score(view: View) -> torch.Tensor:
    settings = view.spec.settings
    logits = expected(view, *_law(view))
    first = min(view.spec.sink, logits.shape[2] - 1)
    logits[:, :, :first] = float("-inf")
    attention = torch.softmax(logits, -1) + float(settings["epsilon"])
    if not settings["norm"]:
        return attention
    return attention * wide(view.v).norm(dim=-1).repeat_interleave(view.group, 1)


def expected(view: View, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """log E exp(scale · q·k) of every entry, [B,H,S], for queries of mean [B|1,H,D] and covariance [B|1,H,D,D] before
    RoPE at the next positions."""
    table = _ahead(view, int(view.spec.settings["future"]))
    keys = view.scale * wide(view.k).repeat_interleave(view.group, 1)
    logits = (keys @ view.rotary.rotate(mean, table).to(keys)[..., None])[..., 0]
    if view.spec.settings["covariance"]:
        covariance = view.rotary.rotate(view.rotary.rotate(covariance, table).mT, table)
        logits = logits + ((keys @ covariance.to(keys)) * keys).sum(-1) / 2
    return logits.clamp_max(torch.finfo(keys.dtype).max)


def _ahead(view: View, future: int) -> Table | None:
    """The mean rotation of so many positions after the last entry's, (cos, sin) [width] each; rows of a batch that
    share a lane stand at the same positions."""
    last = int(view.tags["positions"][0, 0, -1])
    table = view.rotary.table(torch.arange(last + 1, last + 1 + future, device=view.k.device))
    return None if table is None else (table[0].mean(0), table[1].mean(0))


def _law(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the heads' queries before RoPE."""
    if view.spec.tables:
        chosen = [view.table(name).unflatten(0, (-1, view.group))[view.heads].flatten(0, 1)
                  for name in ("mean", "covariance")]  # fmt: skip
        return chosen[0][None], chosen[1][None]
    places = view.tags["positions"].index_select(2, view.rows).repeat_interleave(view.group, 1)
    bare = wide(view.rotary.unrotate(view.q, view.rotary.table(places)))
    skip = min(int(view.spec.settings["skip"]), bare.shape[2] - 1)
    bare = bare[:, :, skip:]
    mean = bare.mean(2)
    apart = bare - mean[:, :, None]
    return mean, apart.mT @ apart / apart.shape[2]
