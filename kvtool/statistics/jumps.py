"""How far a query turns from one token to the next, and how much of what it looks at changes with that, per KV head.

    r_t = mean over the query heads of a group of cos(q_t−1, q_t), after RoPE
    T_t = the SHARE of the first entries with most attention by the group's mean weights at token t
    J_t = |T_t−1 ∩ T_t| / |T_t−1 ∪ T_t|

`count` [L,K,BINS] counts the r_t of each bin from −1 to 1, `overlap` [L,K,BINS] sums their J_t (what LouisKV looks at,
arXiv 2510.11292). Tokens looked at are the last `ROWS` of each text, of its second half at most; the first entries are
all before them. Layers with a sliding window of their own are left out. It knows nothing of steps further apart than
one, nor of learned sinks.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic

BINS = 80
ROWS = 128
SHARE = 0.1


class Jumps(Statistic):
    default = False

    def zero(self) -> None:
        shape = (self.geometry.layers, self.geometry.kv_heads, BINS)
        self.add("count", *shape)
        self.add("overlap", *shape)

    def states(self, view: States) -> None:
        first = max(view.k.shape[1] - ROWS, view.k.shape[1] // 2)
        if not first or self.geometry.windows[view.layer] is not None:
            return
        q = view.q[:, first:].float().unflatten(0, (len(view.k), -1))
        turned = torch.cosine_similarity(q[:, :, :-1], q[:, :, 1:], dim=-1).mean(1)  # [K,R−1]
        bins = ((turned + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        for head, logits in enumerate(view.logits(first, keys=first)):
            self["count"][view.layer, head] += torch.bincount(bins[head], minlength=BINS)
            self["overlap"][view.layer, head] += torch.bincount(bins[head], overlaps(logits), BINS)


def overlaps(logits: torch.Tensor) -> torch.Tensor:
    """Logits [G,R,S] of R tokens → J [R−1] of each and the one before."""
    count = max(1, round(SHARE * logits.shape[2]))
    taken = torch.zeros_like(logits[0]).scatter(1, logits.softmax(-1).mean(0).topk(count).indices, 1.0)
    both = (taken[1:] * taken[:-1]).sum(1)
    return both / (2 * count - both)
