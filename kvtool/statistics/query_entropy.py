"""How many directions a head's queries take: the entropy of their spectrum, cut off after the largest 32 eigenvalues.

    x = q − mean over tokens, each row divided by its norm;   Σ = xᵀx / T;   ρ = Σ / tr Σ + 1e-10·I
    S = −Σ_{i ≤ 32} λ_i ln λ_i / ln D,   λ the eigenvalues of ρ from large to small     (UNComp, arXiv 2410.03090)

of queries after RoPE, per query head and text. Because of the cut, S falls again when more than 32 directions are taken
alike. `places` counts the texts in which a KV head has each place in its layer by the mean of its group, 0 the lowest:
votes of texts for groups of heads, which the released code adds up, can be made of them. 0 where all queries are the
same.
"""

from __future__ import annotations

import math

import torch

from kvtool.statistics._base import States, Statistic

LARGEST = 32
FLOOR = 1e-10


class QueryEntropy(Statistic):
    default = False

    def zero(self) -> None:
        self.add("entropy", self.geometry.layers, self.geometry.query_heads)
        self.add("places", self.geometry.layers, self.geometry.kv_heads, self.geometry.kv_heads)
        self.add("sequences", 1)

    def states(self, view: States) -> None:
        each = torch.stack([entropy(q) for q in view.q])
        by_group = each.unflatten(0, (self.geometry.kv_heads, -1)).mean(1)
        self["entropy"][view.layer] += each
        for place, head in enumerate(rising(by_group).tolist()):
            self["places"][view.layer, head, place] += 1
        if view.layer == 0:
            self["sequences"] += 1


def entropy(q: torch.Tensor) -> torch.Tensor:
    """Queries of one head [T,D] → S, fp64."""
    return nats(q) / math.log(q.shape[-1])


def nats(rows: torch.Tensor) -> torch.Tensor:
    """−Σ_{i ≤ 32} λ_i ln λ_i of rows [T,D], fp64; xxᵀ has the same spectrum as xᵀx, and is smaller for few rows."""
    x = torch.nn.functional.normalize(rows.double() - rows.double().mean(0), dim=-1)
    products = (x @ x.T if len(x) < x.shape[1] else x.T @ x) / len(x)
    size = products.trace()
    if not float(size):
        return size
    values = torch.linalg.eigvalsh(products / size).flip(0)[:LARGEST].clamp_min(0) + FLOOR
    return -(values * values.log()).sum()


def rising(scores: torch.Tensor) -> torch.Tensor:
    """The indices of scores [K] from the lowest to the highest; of equal ones the first is the highest."""
    return torch.argsort(scores, descending=True, stable=True).flip(0)
