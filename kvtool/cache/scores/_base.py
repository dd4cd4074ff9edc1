"""What a scoring rule is given. A rule is a file with `score(view) -> Tensor`, higher for entries worth keeping: fp32
[B,H,S] if it looks at queries (the pipeline reduces the GQA group), [B,K,S] if it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class View:
    """k, v [B,K,S,D] post-RoPE at positions 0 … S−1; q [B,H,N,D] the observed queries, which stand at `rows` int64 [N].

    A query sees entries up to its own position.
    """

    q: torch.Tensor
    rows: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    softcap: float | None
    seed: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]
