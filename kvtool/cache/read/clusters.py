"""k-means over the keys of one head: units of entries that are alike, wherever they stand.

Keys less their mean are assigned to the centroid of largest cosine (RetroInfer's spherical k-means, arXiv 2505.02922);
centroids begin as keys at equal distances, so that nothing is random, and end as plain means of their entries.
Long prompts are clustered a segment at a time: the cost is linear in the prompt.
"""

from __future__ import annotations

import torch

from kvtool_kernels.precision import wide, wider

ROUNDS = 10
SEGMENT = 8192  # entries that are clustered together


def clustered(k: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B,K,S,D] → the cluster of each entry int32 [B,K,S], and ⌈S/unit⌉ or a few more cluster sizes int32 [B,K,U]."""
    labels, sizes, first = [], [], 0
    for piece in k.split(SEGMENT, dim=2):
        count = -(-piece.shape[2] // unit)
        own = _labels(piece, count)
        sizes.append(torch.zeros_like(own[..., :count]).scatter_add(2, own, torch.ones_like(own)))
        labels.append(own + first)
        first += count
    return torch.cat(labels, dim=2).int(), torch.cat(sizes, dim=2).int()


def means(x: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The mean of x [B,K,S,D] over each cluster, [B,K,U,D]; zero for empty ones."""
    sums = x.new_zeros(*sizes.shape, x.shape[3], dtype=wider(x.dtype))
    index = labels.long()[..., None].expand(-1, -1, -1, x.shape[3])
    return (sums.scatter_add(2, index, x.to(sums.dtype)) / sizes[..., None].clamp_min(1)).to(x.dtype)


def _labels(k: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [B,K,S]."""
    entries = k.shape[2]
    x = wide(k)
    x = x - x.mean(2, keepdim=True)
    centroids = x[:, :, torch.arange(count, device=k.device) * entries // count]
    labels = torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device)
    for _ in range(ROUNDS):
        labels = (x @ torch.nn.functional.normalize(centroids, dim=-1).transpose(-1, -2)).argmax(-1)
        sizes = torch.zeros_like(labels[..., :count]).scatter_add(2, labels, torch.ones_like(labels))
        centroids = torch.where(sizes[..., None] > 0, means(x, labels, sizes), centroids)
    return labels
