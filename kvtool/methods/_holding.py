"""Which encoding each layer, side and KV head has, and the store that says so. Shapes: L layers, K KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvtool.errors import InputError
from kvtool.measuring.effects import Side
from kvtool.methods._base import Context, full_attention
from kvtool.methods._candidates import Candidate
from kvtool.plan import Plan
from kvtool.slots import RAW, Store

SIDES: tuple[Side, ...] = ("keys", "values")
Candidates = dict[Side, list[Candidate]]


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


class Choice(NamedTuple):
    """ways int64 [2,L,K]: the candidate of each side. first int32 [L]: see `Store.first`."""

    ways: torch.Tensor
    first: torch.Tensor


def together(key: Candidate, value: Candidate) -> bool:
    """May these be a layer's two sides everywhere?"""
    wide, other = (key, value) if key.reach >= value.reach else (value, key)
    return all(other.fits(span) for span in wide.groups)


def uniform(context: Context, key: Candidate, value: Candidate, windows: Windows) -> Plan:
    """Every head of every layer held alike."""
    g = context.geometry
    ways, first = torch.zeros(2, g.layers, g.kv_heads, dtype=torch.long), torch.arange(g.layers, dtype=torch.int32)
    for span in max(key.groups, value.groups, key=lambda groups: max(map(len, groups), default=0)):
        first[list(span)] = span[0]
    store = stored(context, {"keys": [key], "values": [value]}, Choice(ways, first), windows)
    return Plan("uniform", context.running.fingerprint, store=store)


def stored(context: Context, candidates: Candidates, choice: Choice, windows: Windows) -> Store:
    """The slot.

    Pairs without tables are shared across layers. Of those with tables a layer's heads share one if they all use it;
    else each has its own part, so that no table is held for heads that do not use it. Layers that are written as one
    have one pair, whose tables are those of all their heads."""
    whole = full_attention(context.geometry)
    pairs: dict[tuple[str, str, int, int], int] = {}
    keys, values = [], []
    index = torch.full(whole.shape, RAW, dtype=torch.int32)
    for layer, head in whole.nonzero().tolist():
        ways = [candidates[side][int(choice.ways[number, layer, head])] for number, side in enumerate(SIDES)]
        span = (choice.first == choice.first[layer]).nonzero().flatten().tolist()
        tables = any(len(way.encodings) > 1 or way.groups for way in ways)
        alike = bool((choice.ways[:, span] == choice.ways[:, layer, head, None, None]).all())
        name = (ways[0].name, ways[1].name, span[0] if tables else RAW, head if tables and not alike else RAW)
        if name not in pairs:
            pairs[name] = len(pairs)
            own = [way.over(span) if alike else way.of(layer).heads([head], whole.shape[1]) for way in ways]
            keys.append(own[0])
            values.append(own[1])
        index[layer, head] = pairs[name]
    joined = len(choice.first.unique()) < len(choice.first)
    return Store(
        tuple(keys), tuple(values), index, windows.sink, windows.recent, windows.block, choice.first if joined else None
    )
