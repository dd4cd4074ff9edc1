"""What a budget rule is given, and the deal that rules share.

A rule is a file with `LEVEL`, whose lanes deal with one another ("head": none, "layer": those of one layer, "model":
all), `APART`, which says whether heads of a layer may come to keep different numbers, and `deal(ballots)`: how many
entries each KV head of each ballot holds, what always stays included. It is asked once, when the prompt is in. `FIXED`
says that the answer depends on nothing but how many entries there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.slots import Select

Limits = list[list[int]]


@dataclass(frozen=True)
class Ballot:
    """One lane: scores [B,K,S] of its entries, what they were made from, the entries that each head would hold by
    itself, [K], and the slice of entries that do not stay whatever they score."""

    view: View
    scores: torch.Tensor
    limits: list[int]
    free: slice

    @property
    def spec(self) -> Select:
        return self.view.spec

    @property
    def entries(self) -> int:
        return self.scores.shape[2]

    @property
    def fixed(self) -> int:
        """Entries that stay whatever they score."""
        return self.entries - len(range(*self.free.indices(self.entries)))


def by_layer(ballots: list[Ballot]) -> dict[int, list[Ballot]]:
    """The lanes of each layer."""
    layers: dict[int, list[Ballot]] = {}
    for ballot in ballots:
        layers.setdefault(ballot.view.layer, []).append(ballot)
    return layers


def pooled(ballots: list[Ballot]) -> Limits:
    """All heads of all ballots, of one row, share the sum of their budgets by score."""
    scores = torch.cat([ballot.scores[0, :, ballot.free] for ballot in ballots])
    first = ballots[0]
    flat = dealt(scores, list(chain.from_iterable(b.limits for b in ballots)), first.entries, first.spec.floor)
    rest = iter(flat)
    return [[next(rest) for _ in ballot.limits] for ballot in ballots]


def dealt(scores: torch.Tensor, limits: list[int], entries: int, floor: float) -> list[int]:
    """scores [R,F] of the F entries, of `entries`, that R heads may drop, and how many entries each would hold by
    itself → how many each holds of the common budget:

        c_h of head h's scores are among the best Σ_h b_h of all;   count_h = [c_h (1 − floor)] + ⌊floor · b_h⌋

    b_h is a head's limit less what always stays; [] rounds half to even, so the sum may miss the budget by a few.
    """
    fixed = entries - scores.shape[1]
    own = [max(0, limit - fixed) for limit in limits]
    if sum(own) >= scores.numel():
        return limits
    order = torch.argsort(scores.flatten().flip(0), descending=True, stable=True)[: sum(own)]
    counts = torch.bincount((scores.numel() - 1 - order) // max(1, scores.shape[1]), minlength=len(limits)).tolist()
    shares = [round(count * (1 - floor)) + int(base * floor) for count, base in zip(counts, own, strict=True)]
    return [max(1, fixed + share) for share in shares]


def covering(scores: torch.Tensor, free: slice, mass: float) -> int:
    """The fewest entries, with all outside `free` among them, that hold this share of the sum of scores [S]."""
    scores = scores.clamp_min(0).double()
    best = scores[free].sort(descending=True).values
    sure = scores.sum() - best.sum()
    held = torch.cat([sure[None], sure + best.cumsum(0)])
    more = int((held < mass * held[-1]).sum())
    return max(1, len(scores) - len(best) + more)
