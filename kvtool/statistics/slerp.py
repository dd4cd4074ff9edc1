"""What one direction for each pair of adjacent layers' entries costs, for several places on the arc between the two.

`k`, `v` [L−1,K,11]: sums over tokens of ‖x¹ − x̂¹‖² + ‖x² − x̂²‖² at t = 0, 0.1, …, 1, where x̂ⁱ = ‖xⁱ‖·e and e lies on
the arc from x¹ to x² at t: 2‖x¹‖²(1 − cos tΩ) + 2‖x²‖²(1 − cos (1 − t)Ω) (MiniCache, arXiv 2405.14366). `k_energy`,
`v_energy` [L−1,K]: sums of ‖x¹‖² + ‖x²‖². RoPE turns both alike, so keys may be either side of it. Tokens are weighted
if the profile weighs them, as the upper layer does.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from kvtool.statistics._base import States, Statistic

PLACES = torch.linspace(0, 1, 11)


class Slerp(Statistic):
    default = False

    def zero(self) -> None:
        pairs, heads = max(0, self.geometry.layers - 1), self.geometry.kv_heads
        for side in "kv":
            self.add(side, pairs, heads, len(PLACES))
            self.add(f"{side}_energy", pairs, heads)
        self.add("tokens", 1)
        self.below: tuple[torch.Tensor, torch.Tensor] | None = None

    def states(self, view: States) -> None:
        if view.layer and self.below is not None:
            for side, second, first in zip("kv", (view.k, view.v), self.below, strict=True):
                self._pair(view.layer - 1, side, first.float(), second.float(), view.weight)
        else:
            self["tokens"] += view.k.shape[1]
        self.below = None if view.layer == self.geometry.layers - 1 else (view.k, view.v)

    def _pair(
        self, pair: int, side: str, first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor | None
    ) -> None:
        cosine = cosine_similarity(first, second, dim=-1).clamp(-1, 1).double()  # [K,T]
        one, two = (x.double().square().sum(-1) * (1 if weight is None else weight) for x in (first, second))
        angle, places = cosine.arccos()[..., None], PLACES.to(cosine)
        error = 2 * one[..., None] * (1 - (places * angle).cos())
        error += 2 * two[..., None] * (1 - ((1 - places) * angle).cos())
        self[side][pair] += error.sum(1)
        self[f"{side}_energy"][pair] += (one + two).sum(1)
