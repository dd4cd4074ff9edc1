"""How many dimensions a spectrum of eigenvalues λ [..., C] uses; p = λ / Σ λ. A zero spectrum has rank 0."""

from __future__ import annotations

import math

import torch

TRUNCATION = 32


def eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """[..., C, C] → [..., C], descending, none below 0."""
    return torch.linalg.eigvalsh(gram.double()).flip(-1).clamp_min(0.0)


def blocks(gram: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[L,C,C] → its diagonal blocks [L,K,D,D]."""
    split = gram.unflatten(2, (kv_heads, -1)).unflatten(1, (kv_heads, -1))  # [L,K,D,K,D]
    return torch.stack([split[:, head, :, head] for head in range(kv_heads)], 1)


def shares(values: torch.Tensor) -> torch.Tensor:
    """λ → p; zero stays zero."""
    return values / values.sum(-1, keepdim=True).clamp_min(1e-300)


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """exp(−Σ p ln p)."""
    rank = torch.special.entr(shares(values)).sum(-1).exp()
    return torch.where(values.sum(-1) > 0, rank, 0.0)


def energy_rank(values: torch.Tensor, share: float) -> torch.Tensor:
    """The least r whose top r eigenvalues hold `share` of Σ λ."""
    short = (shares(values).cumsum(-1) < share - 1e-9).sum(-1)
    return torch.where(values.sum(-1) > 0, short + 1, 0).double()


def truncated_entropy(values: torch.Tensor, width: int) -> torch.Tensor:
    """−Σ_{i ≤ 32} p_i ln p_i / ln width (UNComp, arXiv 2410.03090)."""
    return torch.special.entr(shares(values)[..., :TRUNCATION]).sum(-1) / math.log(max(2, width))
