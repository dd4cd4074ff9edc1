"""The definition of `page_scores` and `attend_selected`.

A page is some consecutive entries. Quest (Tang et al., ICML 2024) bounds every logit of a page from above:

    low[c], high[c] = the least and the greatest k_j[c] over the page
    score = Σ_c max(q[c] · low[c], q[c] · high[c])

`attend_selected` is `attend` over listed entries: out and log-sum-exp run over the entries j in the list, each counted
as often as it is listed; −1 lists none. How scores of a group's queries become one, and which pages are taken, is the
caller's policy. All arithmetic is fp32.
"""

from __future__ import annotations

import torch

from kvtool_kernels.attend.reference import attend
from kvtool_kernels.bias import hiding
from kvtool_kernels.precision import wide


def page_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """q [B,H,T,D], low and high [B,K,P,D] → fp32 [B,H,T,P].

    Two products, since max(q·low, q·high) is q⁺·high + q⁻·low: as fast as a kernel for it.
    """
    grouped = wide(q).reshape(len(q), low.shape[1], -1, q.shape[3])
    low, high = (wide(x).transpose(2, 3) for x in (low, high))
    scores = grouped.clamp_min(0) @ high + grouped.clamp_max(0) @ low
    return scores.reshape(*q.shape[:3], -1)


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,T,D], k and v [B,K,S,D], indices int32 [B,K,M] → out [B,H,T,Dv] in q's dtype, lse [B,H,T] fp32."""
    group = q.shape[1] // k.shape[1]
    place = indices.clamp_min(0).long()[..., None]
    keys, values = (
        x.take_along_dim(place, 2) if x.shape[2] else x.new_zeros(*indices.shape, x.shape[3]) for x in (k, v)
    )
    bias = hiding(indices < 0)
    return attend(q, keys, values, scale=scale, bias=bias.repeat_interleave(group, 1)[:, :, None], softcap=softcap)
