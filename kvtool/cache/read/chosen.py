"""What the queries of a chunk read, block by block, and attention over that.

    [ listed entries, before the block and seen by all of it | entries from `near` on, up to each query's own ]

A block's attention is exact over what it reads, and costs as much as that is long: no T×S mask, and nothing of what is
not read is touched. Shapes as in `lane.py`; C choosers: 1 for all heads, one for each KV head, or for each query head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvtool_kernels.bias import hiding
from kvtool_kernels.ops import attend


@dataclass(frozen=True)
class Block:
    """Queries low … high − 1 of the chunk read entries from `near` on, and those at index int64 [B,C,M] before; −1
    where a row of the batch lists fewer."""

    low: int
    high: int
    near: int
    index: torch.Tensor | None = None


@dataclass(frozen=True)
class Chosen:
    """The blocks of a chunk, in order; `heads`: the layer's KV heads that choose."""

    blocks: tuple[Block, ...]
    heads: tuple[int, ...]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: list[int], options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B,H,T,D] of the KV heads `heads` over k, v [B,K,S,D], all entries up to the chunk's own."""
        places, start = [self.heads.index(head) for head in heads], k.shape[2] - q.shape[2]
        outs = [self._one(block, q, k, v, start, places, options) for block in self.blocks]
        return torch.cat([out for out, _ in outs], dim=2), torch.cat([lse for _, lse in outs], dim=2)

    def _one(
        self, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, places: list[int],
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        rows, bias = q[:, :, block.low : block.high], None
        k, v, far = k[:, :, : start + block.high], v[:, :, : start + block.high], block.index
        near_k, near_v = k[:, :, block.near :], v[:, :, block.near :]
        if far is not None:
            far = self._own(far, places)
            near_k, near_v = (_joined(far, side, near) for side, near in ((k, near_k), (v, near_v)))
            hidden = far < 0
            if bool(hidden.any()):
                wide = torch.nn.functional.pad(hidden, (0, k.shape[2] - block.near))
                bias = hiding(wide)[:, :, None]
        return attend(rows, near_k, near_v, causal=True, bias=bias, **options)

    def _own(self, index: torch.Tensor, places: list[int]) -> torch.Tensor:
        """The choosers of these of the KV heads."""
        if index.shape[1] == 1 or len(places) == len(self.heads):
            return index
        return index.unflatten(1, (len(self.heads), -1))[:, places].flatten(1, 2)


def _joined(index: torch.Tensor, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """The entries at index int64 [B,C,M] of x [B,K,S,D], then near [B,K,n,D]: per KV head, or per query head where
    each chooses."""
    batch, choosers, count = index.shape
    kv_heads, index = x.shape[1], index.clamp_min(0)
    if choosers == 1 and batch == 1:
        return torch.cat([x.index_select(2, index[0, 0]), near], dim=2)
    if choosers == 1:
        index = index.expand(-1, kv_heads, -1)
    group = index.shape[1] // kv_heads
    index = index.reshape(batch, kv_heads, group * count, 1).expand(-1, -1, -1, x.shape[-1])
    taken = x.gather(2, index).reshape(batch, kv_heads * group, count, -1)
    return torch.cat([taken, near.repeat_interleave(group, 1) if group > 1 else near], dim=2)
