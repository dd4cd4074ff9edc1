"""What a rule that ranks earlier entries for blocks of queries is given. A rule is a file with

    class Rule:
        def __init__(self, job: Job) -> None                                     once for each chunk of the prompt
        def pick(self, low, high, first, near, count) -> index int64 [B,C,M]     once for each block

which chooses `count` of the entries first … near − 1 for the queries at positions low … high − 1, ascending; with
`Prefill.mass` it may choose fewer, and then ends a row's list with −1.

Shapes: B batch, K the KV heads of the layer that hold everything, H = K·G their query heads, T queries of the chunk, N
entries up to the chunk's own, C choosers (see `chosen.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.lane import Step
from kvtool.rotary import Rotary
from kvtool.slots import Prefill, Select

ASKED = Select(torch.ones(1, 1, dtype=torch.float32), reduce="sum")  # plain softmax, summed over queries


@dataclass(frozen=True)
class Job:
    """One chunk: q [B,H,T,D], the last of the positions of k [B,K,N,D]; `cuts(low, first, near)`: where units begin
    among these entries for a block of queries from `low` on, int64 [B,U], `near` where a row has fewer, in order."""

    spec: Prefill
    q: torch.Tensor
    k: torch.Tensor
    step: Step
    rotary: Rotary
    layer: int
    cuts: Callable[[int, int, int], torch.Tensor]

    @property
    def start(self) -> int:
        """The position of the first query."""
        return self.k.shape[2] - self.q.shape[2]

    def chosen_by(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,H,...] → [B,C,...], the mean over the query heads that choose together."""
        if self.spec.heads == "each":
            return x
        return x.unflatten(1, (1 if self.spec.heads == "all" else self.k.shape[1], -1)).mean(2)

    def view(self, rows: torch.Tensor) -> View:
        """Queries of the chunk at rows int64 [n], in order, and all entries."""
        places = rows + self.start
        heads = list(range(self.k.shape[1]))
        step = self.step
        return View(self.q[:, :, rows], places, self.k, self.k, step.scale, step.softcap, ASKED, self.layer, heads)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` highest of scores [...,F], ascending; ties go to the newer one."""
    last = scores.shape[-1] - 1
    order = torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)[..., :count]
    return (last - order).sort(-1).values
