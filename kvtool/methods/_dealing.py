"""Bytes dealt among layers, sides and KV heads by measured errors (`_weighing.py`).

Dealt on a tree (`measuring/allocation.py`), since a cache writes both sides of layers as one, or neither:

    all        every group of layers for itself
    a group    either every part of it: smaller groups, down to layers, whose heads and sides choose for themselves
               or as one: one way for its keys and one for its values, in all heads, of which one or both are shared

Shapes: C candidates, L layers, K KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvtool.measuring.allocation import Dealt, Each, Either, Unit, Ways, deal
from kvtool.measuring.effects import Side
from kvtool.methods._base import Context, full_attention
from kvtool.methods._holding import SIDES, Candidates, Choice
from kvtool.methods._weighing import Errors


@dataclass
class _Places:
    """The units of a dealing, and what their choices stand for."""

    candidates: Candidates
    size: Errors
    error: Errors
    known: dict[Side, torch.Tensor]  # candidates that have a ratio
    whole: torch.Tensor  # bool [L,K]
    unit: str
    held: list[tuple[int, torch.Tensor, torch.Tensor, bool]] = field(default_factory=list)

    def ways(self, number: int, members: torch.Tensor, span: Sequence[int] | None, *, shared: bool = False) -> Ways:
        """What is held alike on a side: heads that are written apart, or these layers as one; `shared`: in a basis of
        theirs."""
        side, fit = SIDES[number], self._fit(number, span, shared=shared)
        self.held.append((number, members, torch.tensor(fit), bool(span)))
        size, error = self.size[side][fit] * int(members.sum()), self.error[side][fit][:, members].sum(1)
        return Ways(len(self.held) - 1, size, error)

    def _fit(self, number: int, span: Sequence[int] | None, *, shared: bool) -> list[int]:
        side = SIDES[number]
        named = [(way, self.candidates[side][way]) for way in self.known[side].tolist()]
        held = [(way, each) for way, each in named if each.groups or not shared]
        return [way for way, each in held if (each.fits(span) if span else not each.groups)]

    def apart(self, layers: Sequence[int]) -> Each:
        """Every unit of these layers for itself."""
        among = torch.zeros_like(self.whole)
        among[list(layers)] = self.whole[list(layers)]
        units = _units(among, self.unit)
        return Each(tuple(self.ways(number, members, None) for number in range(len(SIDES)) for members in units))

    def group(self, span: Sequence[int], reaches: Sequence[int]) -> Unit:
        """Layers that may be written as one; `reaches`: of smaller groups within, then its own."""
        smaller = list(reaches[:-1])
        if smaller:
            cut = [span[at : at + smaller[-1]] for at in range(0, len(span), smaller[-1])]
            parts: tuple[Unit, ...] = tuple(self.group(part, smaller) for part in cut)
        else:
            parts = self.apart(span).parts
        members = torch.zeros_like(self.whole)
        members[list(span)] = True
        one = [  # one side or the other is shared: rounding may make as good as apart what is not, and better
            Each(tuple(self.ways(number, members, span, shared=number == side) for number in range(len(SIDES))))
            for side in range(len(SIDES)) if self._fit(side, span, shared=True)
        ]  # fmt: skip
        return Either((Each(parts), *one))

    def choice(self, picks: dict[int, int]) -> Choice:
        ways = torch.zeros(len(SIDES), *self.whole.shape, dtype=torch.long)
        first = torch.arange(len(self.whole), dtype=torch.int32)
        for at, way in picks.items():
            number, members, fit, one = self.held[at]
            ways[number, members] = fit[way]
            if one:
                layers = members.any(1)
                first[layers] = first[layers][0].clone()
        return Choice(ways, first)


def dealt(
    context: Context, candidates: Candidates, size: Errors, error: Errors, ratio: Errors, budget: float, unit: str
) -> tuple[Choice, Dealt]:
    """By the errors, of the candidates that have a ratio, for `budget` bits a number in the mean. unit: what is held
    alike where layers are not written as one: a "head", a "layer", or all layers of a "side"."""
    whole = full_attention(context.geometry)
    known = {side: (ratio[side] > 0).nonzero().flatten() for side in SIDES}
    places = _Places(candidates, size, error, known, whole, unit)
    groups = {way.groups for side in SIDES for way in candidates[side] if way.groups}
    reaches = sorted(max(map(len, each)) for each in groups)
    widest = max(groups, key=lambda each: max(map(len, each)), default=())
    units: list[Unit] = [places.group(span, reaches) for span in widest]
    alone = [layer for layer in whole.any(1).nonzero().flatten().tolist() if all(layer not in span for span in widest)]
    made = deal([*units, *places.apart(alone).parts], budget * len(SIDES) * int(whole.sum()))
    return places.choice(made.picks), made  # type: ignore[arg-type]


def _units(whole: torch.Tensor, unit: str) -> list[torch.Tensor]:
    """Masks bool [L,K] of what is held alike, on one side."""
    numbers = torch.arange(whole.numel()).reshape(whole.shape)
    label = {"head": numbers, "layer": numbers // whole.shape[1], "side": torch.zeros_like(numbers)}[unit]
    return [(label == number) & whole for number in label[whole].unique().tolist()]
