"""What becomes of entries that are not read: one more partial result to merge, made of the units' scores.

    l_u = cap(scale · s(q, u)), the logit that a summary gives the entries of unit u; of its n_u entries m_u are unread
    mean:      weight Σ_read exp(logits) · Σ_u m_u e^{l_u} / Σ_u (n_u − m_u) e^{l_u},   value: the mean of the bulk
    estimate:  weight Σ_u m_u e^{l_u},                                              values: the means of the units

"mean" trusts the scores with a share of attention only (SparF's α, arXiv 2409.04992; here the bulk's, sinks and recent
entries having their exact logits), "estimate" with its amount (RetroInfer, arXiv 2505.02922).

Shapes: as in `units.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.share.folding import for_all


def capped(scores: torch.Tensor, step: Step) -> torch.Tensor:
    """Scores [B,K,G,U] as attention would scale them; units that nothing belongs to stay at −inf."""
    scaled = step.scale * scores
    if step.softcap is None:
        return scaled
    return (step.softcap * torch.tanh(scaled / step.softcap)).masked_fill(scores == float("-inf"), float("-inf"))


def mean(
    lse: torch.Tensor, logits: torch.Tensor, unread: torch.Tensor, sizes: torch.Tensor, value: torch.Tensor
) -> Partial:
    """lse [B,K,G] of what was read, logits [B,K,G,U], unread and sizes int64 [B,K,C,U], value [B,K,1,D] → [B,K,G,D] and
    [B,K,G]."""
    left = torch.logsumexp(logits + unread.to(logits.dtype).log(), -1)
    taken = torch.logsumexp(logits + (sizes - unread).to(logits.dtype).log(), -1)
    return value.expand(*logits.shape[:3], -1), lse + left - taken


def estimate(logits: torch.Tensor, unread: torch.Tensor, values: Sequence[torch.Tensor]) -> Partial:
    """logits [B,K,G,U], unread int64 [B,K,C,U], values [B,K,U_i,D], or [1,K,U_i,D] if all rows share them, of all units
    in order → [B,K,G,D], [B,K,G]."""
    weights = logits + unread.to(logits.dtype).log()
    lse = torch.logsumexp(weights, -1)
    shares = torch.exp(weights - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out, first = torch.zeros((), dtype=torch.float32, device=logits.device), 0
    for value in values:
        value = value.to(logits.dtype)
        mine = shares[..., first : first + value.shape[2]]
        out = out + for_all(mine, len(value), lambda x: x @ value)  # noqa: B023 (called at once)
        first += value.shape[2]
    return out, lse


def foremost(unread: torch.Tensor, ranked: torch.Tensor, share: float) -> torch.Tensor:
    """Of unread int64 [B,K,C,U], the units that come first in ranked [B,K,C,U], a share of all; zero elsewhere."""
    if share >= 1:
        return unread
    rest = ranked.masked_fill(unread == 0, float("-inf"))
    index = rest.topk(round(share * unread.shape[3]), dim=-1).indices
    return unread * torch.zeros_like(unread).scatter(3, index, 1)
