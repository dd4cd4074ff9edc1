"""What a small network reads off a token's own query, key and value, each before RoPE.

    s = W₂ · SiLU(W₁ · [q; k; v])      (the retaining heads of Locret: Huang et al., arXiv 2410.01805)

One network a layer, over all its heads, one score a KV head. It sees no other token and no position, so permuting
tokens permutes scores, and it need not be run again.

Tables: `hidden` [L,N,(H+2K)·D] and `score` [L,K,N], W₁ and W₂. [B,K,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.errors import InputError
from kvtool_kernels.precision import wide

SEES = "own"
NEEDS = ("positions",)


def score(view: View) -> torch.Tensor:
    hidden, last = view.table("hidden"), view.table("score")
    if len(view.heads) < len(last):
        raise InputError(
            "a learned score looks at all heads of a layer",
            got=f"{len(view.heads)} of {len(last)} KV heads that share a policy",
            remedy="compose with a plan that treats the heads of a layer alike",
        )
    table = view.rotary.table(view.tags["positions"][:, :1])
    q, k = (wide(view.rotary.unrotate(x, table)) for x in (view.q, view.k))
    return retained(features(q, k, wide(view.v)), hidden.to(q.dtype), last.to(q.dtype))


def features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [...,H,T,D], k and v [...,K,T,D] → [q; k; v] of each token, [...,T,(H+2K)·D]."""
    return torch.cat([q, k, v], dim=-3).transpose(-3, -2).flatten(-2)


def retained(x: torch.Tensor, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """x [...,T,C], W₁ hidden [...,N,C], W₂ last [...,K,N] → [...,K,T]."""
    return last @ torch.nn.functional.silu(hidden @ x.mT)
