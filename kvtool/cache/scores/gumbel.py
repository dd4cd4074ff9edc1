"""Attention probability with seeded Gumbel noise on the logits, so that entries just below the best keep a chance.

    s_j = reduce_i softmax_j((scale · q_i · k_j + ζ_ij) / τ),   ζ ~ Gumbel(0, 1)      (Keyformer: arXiv 2403.09054)

τ is `Select.temperature` for the prompt and `Select.warming` more at every step. Noise differs by layer, KV head and
step, and is the same for every row of a batch. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.scores._base import View, probabilities, reduced

SEES = "queries"


def score(view: View) -> torch.Tensor:
    draws = view.draws()

    def noise(shape: torch.Size) -> torch.Tensor:
        each = [torch.empty(view.group, *shape[2:]).exponential_(generator=draw) for draw in draws]
        return -torch.cat(each).log()

    return reduced(view, (p for _, p in probabilities(view, noise)))
