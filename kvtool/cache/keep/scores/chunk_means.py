"""Of a prompt, the product of the observed queries with the mean key of each entry's chunk: entries of a chunk stay, or
go, together (TriForce: Sun et al., arXiv 2404.11912).

    s_j = mean_i scale · q_i · k̄_c,   c = ⌊j / settings["chunk"]⌋,   k̄_c the mean key of chunk c

Raw products, without a softmax; the last chunk may be shorter. Once the prompt has been scored nothing is scored again:
what is decoded stands above all of it, so that decode steps drop the worst chunks' entries first, then, when none are
left, the oldest decoded ones. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool_kernels.precision import wide

SEES = "queries"
DECODED = 1e30  # more than any product, and finite: entries that always stay are infinite


def score(view: View) -> torch.Tensor:
    batch, heads, entries = len(view.k), view.q.shape[1], view.k.shape[2]
    if view.turn:
        out = wide(view.k).new_zeros(batch, heads, entries)
        out[..., -1] = DECODED
        return out
    means = chunk_means(wide(view.k), int(view.spec.settings["chunk"]))
    q = wide(view.q).mean(2).unflatten(1, (view.k.shape[1], -1))
    scores = view.scale * q @ means.mT
    return scores.repeat_interleave(int(view.spec.settings["chunk"]), -1)[..., :entries].flatten(1, 2)


def chunk_means(k: torch.Tensor, chunk: int) -> torch.Tensor:
    """k [B,K,S,D] → [B,K,⌈S/chunk⌉,D]."""
    count = k.shape[2] // chunk
    means = k[:, :, : count * chunk].unflatten(2, (count, chunk)).mean(3)
    rest = k[:, :, count * chunk :]
    return torch.cat([means, rest.mean(2, keepdim=True)], dim=2) if rest.shape[2] else means
