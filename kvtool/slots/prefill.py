"""What a prompt's queries read while it is fed; a part of the slot read. L layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from kvtool.errors import InputError
from kvtool.records import Record


@dataclass(frozen=True)
class Prefill(Record):
    """Which earlier entries a block of a prompt's queries attends to, besides its own, which are causal as ever.

    budget: fp32 [L]: earlier entries that a block reads, sinks and local ones among them, as a share of the prompt
        when ≤ 1, else a count. A layer of budget 1 reads everything.
    block: queries that choose together: those at positions of one multiple of it.
    rule: how the entries are ranked that are not read anyway (see `cache/read/prefills/`).
    sink, local: first entries, and entries right before the block, that are always read.
    dense: last queries of the prompt that read everything.
    heads: who chooses: all heads of the layer together, each KV head for its group, or each query head.
    unit, summary: entries that are chosen together, and what stands for them (see `cache/read/summaries/`): `unit`
        consecutive ones, or with a `cut` those between two boundaries, however many. The last unit that is chosen
        gives its newest entries, as many as the budget has left.
    cut: what says how much of a boundary a place is (see `cache/read/boundaries/`), by the keys of the layer `leader`
        and `window` entries on both sides of it; `tables` is what it was trained to. Boundaries are made once, there,
        for all layers. They are the places above `above`, the highest first, none within `apart` of a higher one, and
        `most` for each block at most.
    mass: the rule chooses the fewest entries that hold this share of its score, and the budget is a bound; 0: the
        budget says how many.
    seed: of what a rule draws.
    """

    budget: torch.Tensor
    block: int = 128
    rule: str = "units"
    sink: int = 0
    local: int = 64
    dense: int = 64
    heads: Literal["all", "group", "each"] = "all"
    unit: int = 32
    summary: str = "mean"
    cut: str | None = None
    leader: int = 0
    window: int = 4
    above: float = 0.0
    apart: int = 8
    most: int = 8
    tables: dict[str, torch.Tensor] = field(default_factory=dict)
    mass: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.sink, self.local, self.dense, self.leader, self.apart)
        if min(self.block, self.unit, self.window, self.most) < 1 or min(counts) < 0:
            raise InputError(
                "bad reading of a prompt", got=self, expected="block, unit, window, most >= 1 and no negative count"
            )
        if bool((self.budget <= 0).any()) or not 0 <= self.mass < 1:
            raise InputError(
                "bad budget of a prompt's reading", got=f"budget {float(self.budget.min())}, mass {self.mass}",
                expected="budget above 0, mass from 0 to below 1",
            )  # fmt: skip
        if self.mass and self.heads != "all":
            raise InputError("a share of the score is held by all heads together", got=f"heads {self.heads!r}")
        early = [layer for layer in range(min(self.leader, len(self.budget))) if self.acts(layer)]
        if self.cut is not None and early:
            raise InputError(
                f"layer {early[0]} reads between boundaries that layer {self.leader} makes after it",
                expected="budget 1 in the layers before",
            )

    @property
    def lossless(self) -> bool:
        return not any(self.acts(layer) for layer in range(len(self.budget)))

    def acts(self, layer: int) -> bool:
        """Does this layer read less than everything?"""
        return bool(self.mass) or bool(self.budget[layer] != 1.0)

    def entries(self, layer: int, length: int) -> int:
        """How many of the earlier entries a block reads, of a prompt of this length."""
        budget = float(self.budget[layer])
        return round(budget * length) if budget <= 1 else int(budget)

    def seen(self, layer: int, length: int) -> int:
        """Σ of the entries that each query reads of a prompt of this length, fed at once; with a mass, at most."""
        total, low, dense = 0, 0, max(0, length - self.dense)
        while low < dense:
            own = min(self.block, dense - low)
            near = max(0, low - self.local)
            before = min(low, max(self.entries(layer, length), min(self.sink, near) + low - near))
            total += own * before + own * (own + 1) // 2
            low += own
        return total + sum(range(dense + 1, length + 1))

    def runs(self, layer: int) -> bool:
        """Does this layer choose, or make the boundaries that others choose between?"""
        return self.acts(layer) or (self.cut is not None and layer == self.leader and not self.lossless)
