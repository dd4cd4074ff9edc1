"""What each of many encodings of each head's keys or values costs in predictions, measured on texts.

    error[c, l, k] = ρ_c · effect of candidate c on KV head k of layer l alone (`measuring/effects.py`), nats a token
    ρ_c = KL(all layers' side held as c, the other in 16 bits) / Σ_{l,k} effect         (`measuring/divergence.py`)

The effects say which layers and heads suffer, and take one pass a text for all candidates; ρ puts right what their
second order leaves out, candidate by candidate, so that the sum is exact for each of them everywhere. An interrupted
calibration resumes after the effects, or between ratios; one Context measures once, whatever is asked of it then.
Shapes: C candidates, L layers, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.measuring.allocation import Allocation, allocate, hull
from kvtool.measuring.divergence import Judge
from kvtool.measuring.effects import Side, View, views
from kvtool.methods._base import Context, full_attention
from kvtool.methods._candidates import Candidate, sixteen
from kvtool.methods._prompts import texts
from kvtool.plan import Plan
from kvtool.slots import RAW, Store

SIDES: tuple[Side, ...] = ("keys", "values")
SMALL = 1e-5  # nats: effects below are rounding, and no ratio is taken of them
FAR = 8.0  # ρ lies between 1/FAR and FAR
Candidates = dict[Side, list[Candidate]]
Errors = dict[Side, torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """What a store leaves raw, and how many entries it encodes together."""

    sink: int
    recent: int
    block: int

    def raw(self, length: int) -> int:
        """Entries that are raw after `length` tokens."""
        return length - max(0, length - self.sink - self.recent) // self.block * self.block

    def bits(self, share: float, length: int) -> float:
        """What a number of an encoded entry may take if `share` of 16 bits is held after `length` tokens; 16 if none
        is encoded by then. Raises InputError when the raw entries alone take as much."""
        raw = self.raw(length)
        if raw >= length:
            return 16.0
        left = 16 * (share * length - raw) / (length - raw)
        if left <= 0:
            raise InputError(
                "the raw entries alone take the whole budget", got=f"{share:g}",
                expected=f"more than {raw / length:.3f} at {length} tokens",
                remedy="a smaller window (recent, sink, block), or a longer length",
            )  # fmt: skip
        return left

    def share(self, bits: float, length: int) -> float:
        """The inverse of `bits`."""
        raw = self.raw(length)
        return (raw + (length - raw) * bits / 16) / length


def samples(context: Context, *, count: int, tokens: int, steps: int) -> list[Sample]:
    """`count` texts of `tokens` tokens, each with the `steps` that follow, from the half that calibration may see."""
    read = texts(context, samples=count, tokens=tokens + steps)
    return [replace(s, tokens=s.tokens[:tokens], answer=s.tokens[tokens:]) for s in read]


def met(context: Context, seen: Sequence[dict[int, View]]) -> torch.Tensor:
    """What errors of values meet: E g gᵀ of the attention output's gradients g, fp32 [L,K,D,D]; 0 where unknown."""
    g = context.geometry
    total = torch.zeros(g.layers, g.kv_heads, g.head_dim, g.head_dim, dtype=torch.float64)
    for each in seen:
        for layer, view in each.items():
            rows = view.gradient.double().unflatten(1, (g.kv_heads, -1)).transpose(0, 1).flatten(1, 3)
            total[layer] += (rows.mT @ rows).cpu()
    return total.float()


def effects(
    context: Context,
    texts: Sequence[Sample],
    windows: Windows,
    candidates: Callable[[torch.Tensor], Candidates],
    draws: int,
) -> tuple[Candidates, Errors, Errors]:
    """`candidates` of what errors of values meet, and each one's (effect, size), fp64 [C,L,K] by side, means over the
    texts; see `View`."""
    kept = context.resume
    if "met" in kept:
        made = candidates(kept["met"])
        effect, size = ({side: kept[f"{name}.{side}"].double() for side in SIDES} for name in ("effect", "size"))
        if any(len(effect[side]) != len(made[side]) for side in SIDES):
            raise InputError("these errors were measured of other encodings", remedy="give the same options as then")
        return made, effect, size
    seen: list[dict[int, View]] = []
    for number, sample in enumerate(texts):
        seen.append(views(context.running, sample, draws=draws, seed=context.seed + number))
        context.progress(number + 1, len(texts), "gradients")
    asked = met(context, seen)
    made, g = candidates(asked), context.geometry
    effect = {side: torch.zeros(len(ways), g.layers, g.kv_heads).double() for side, ways in made.items()}
    size = {side: torch.zeros_like(zero) for side, zero in effect.items()}
    for done, layer in enumerate(seen[0], 1):
        for view in (each[layer] for each in seen):
            coded = view.coded(windows.sink, windows.recent, windows.block)
            for side, ways in made.items():
                for number, way in enumerate(ways):
                    change = view.change(side, way.of(layer), coded)
                    effect[side][number, layer] += view.effect(change).cpu() / len(seen)
                    size[side][number, layer] += view.size(change).cpu() / len(seen)
        context.progress(done, len(seen[0]), "errors of layers")
    context.resume |= {"met": asked, **_named("effect", effect), **_named("size", size)}
    context.checkpoint(context.resume)
    return made, effect, size


def _named(name: str, state: Errors) -> dict[str, torch.Tensor]:
    """As a checkpoint holds it."""
    return {f"{name}.{side}": tensor for side, tensor in state.items()}


def anchored(
    context: Context, effect: Errors, candidates: Candidates, texts: Sequence[Sample], windows: Windows
) -> Errors:
    """ρ fp64 [C] of each side; 0 for candidates that no head could want, which are not measured."""
    ratio = {side: context.resume.get(f"ratio.{side}", torch.zeros(len(candidates[side]))).double() for side in SIDES}
    queue = [(side, way) for side in SIDES for way in wanted(context, effect[side], candidates[side])]
    queue = [(side, way) for side, way in queue if not float(ratio[side][way])]
    judge = Judge(context.running, texts)
    for done, (side, way) in enumerate(queue, 1):
        total = float(effect[side][way].sum())
        ratio[side][way] = 1.0
        if total > SMALL:
            pair = (candidates[side][way], sixteen())
            made = uniform(context, *(pair if side == "keys" else pair[::-1]), windows)
            ratio[side][way] = min(FAR, max(1 / FAR, float(judge.divergences(made).mean()) / total))
        context.resume |= _named("ratio", ratio)
        context.checkpoint(context.resume)
        context.progress(done, len(queue), f"{side} in {candidates[side][way].name}")
    return ratio


def wanted(context: Context, effect: torch.Tensor, ways: Sequence[Candidate]) -> list[int]:
    """Candidates on the convex hull of any head."""
    size, found = bits(context, ways), set()
    for each in effect[:, full_attention(context.geometry)].T:
        found |= set(hull(size, each))
    return sorted(found)


def bits(context: Context, ways: Sequence[Candidate]) -> torch.Tensor:
    """fp64 [C], bits a number."""
    g = context.geometry
    return torch.tensor([way.bits(g.kv_heads, g.head_dim) for way in ways], dtype=torch.float64)


def dealt(
    context: Context, size: Errors, error: Errors, ratio: Errors, budget: float, unit: str
) -> tuple[torch.Tensor, Allocation]:
    """choice int64 [2,L,K] by the errors, of the candidates that have a ratio, for `budget` bits a number in the mean.
    unit: what is held alike: a "head", a "layer", or all layers of a "side"."""
    whole = full_attention(context.geometry)
    sizes, errors, places = [], [], []
    for number, side in enumerate(SIDES):
        known = (ratio[side] > 0).nonzero().flatten()
        for members in _units(whole, unit):
            places.append((number, members, known))
            sizes.append(size[side][known] * int(members.sum()))
            errors.append(error[side][known][:, members].sum(1))
    made = allocate(sizes, errors, budget * 2 * int(whole.sum()))
    choice = torch.zeros(2, *whole.shape, dtype=torch.long)
    for (number, members, known), way in zip(places, made.choice.tolist(), strict=True):
        choice[number, members] = known[way]
    return choice, made


def _units(whole: torch.Tensor, unit: str) -> list[torch.Tensor]:
    """Masks bool [L,K] of what is held alike, on one side."""
    numbers = torch.arange(whole.numel()).reshape(whole.shape)
    label = {"head": numbers, "layer": numbers // whole.shape[1], "side": torch.zeros_like(numbers)}[unit]
    return [(label == number) & whole for number in label[whole].unique().tolist()]


def uniform(context: Context, key: Candidate, value: Candidate, windows: Windows) -> Plan:
    """Every head of every layer held alike."""
    g = context.geometry
    choice = torch.zeros(2, g.layers, g.kv_heads, dtype=torch.long)
    store = stored(context, {"keys": [key], "values": [value]}, choice, windows)
    return Plan("uniform", context.running.fingerprint, store=store)


def stored(context: Context, candidates: Candidates, choice: torch.Tensor, windows: Windows) -> Store:
    """choice int64 [2,L,K] into the candidates of each side → the slot.

    Pairs without tables are shared across layers. Of those with tables a layer's heads share one if they all use it;
    else each has its own part, so that no table is held for heads that do not use it."""
    whole = full_attention(context.geometry)
    pairs: dict[tuple[str, str, int, int], int] = {}
    keys, values = [], []
    index = torch.full(whole.shape, RAW, dtype=torch.int32)
    for layer, head in whole.nonzero().tolist():
        ways = [candidates[side][int(choice[number, layer, head])] for number, side in enumerate(SIDES)]
        tables = any(len(way.encodings) > 1 for way in ways)
        alike = bool((choice[:, layer] == choice[:, layer, head, None]).all())
        name = (ways[0].name, ways[1].name, layer if tables else RAW, head if tables and not alike else RAW)
        if name not in pairs:
            pairs[name] = len(pairs)
            own = [way.of(layer) if alike else way.of(layer).heads([head], whole.shape[1]) for way in ways]
            keys.append(own[0])
            values.append(own[1])
        index[layer, head] = pairs[name]
    return Store(tuple(keys), tuple(values), index, windows.sink, windows.recent, windows.block)
