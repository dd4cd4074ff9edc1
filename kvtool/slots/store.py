"""The slot store: how an entry is encoded. L layers, K KV heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.records import Record

RAW = -1  # in `Store.index`: the head's entries are held as they are


@dataclass(frozen=True)
class Store(Record):
    """How entries are encoded: a palette of pairs, and which pair each KV head uses.

    keys, values: encodings. index: int32 [L,K] into both, or RAW. The first `sink` entries and the newest `recent` stay
    raw; entries older than that are encoded `block` at a time, once, in order. Heads with a window hold only sinks
    and recent entries, so theirs stay raw.
    span: so many neighbouring layers, from layer 0 on, are written as one with span·K KV heads. They must all use one
    pair in every head, or all be RAW, and so must those left over.
    """

    keys: tuple[Encoding, ...]
    values: tuple[Encoding, ...]
    index: torch.Tensor
    sink: int = 0
    recent: int = 0
    block: int = 32
    span: int = 1

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise InputError("encodings come in pairs", got=f"{len(self.keys)} for keys, {len(self.values)} for values")
        for encoding in (*self.keys, *self.values):
            if self.block < 1 or self.block % encoding.block:
                raise InputError("bad block", got=self.block, expected=f"a multiple of {encoding.block} entries")

    @property
    def lossless(self) -> bool:
        used = [number for number in self.index.unique().tolist() if number != RAW]
        return all(self.keys[number].lossless and self.values[number].lossless for number in used)

    def then(self, other: Store) -> Store:
        """Both encodings, one after the other, for every KV head; the longer windows, and blocks that suit both.

        Layers that a store across layers leaves out stay raw."""
        pairs: dict[tuple[int, int], int] = {}
        index = torch.full_like(self.index, RAW)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in self.index.shape)).tolist():
            pair = (int(self.index[tuple(at)]), int(other.index[tuple(at)]))
            apart = (self.span > 1 and pair[0] == RAW) or (other.span > 1 and pair[1] == RAW)
            if pair != (RAW, RAW) and not apart:
                index[tuple(at)] = pairs.setdefault(pair, len(pairs))
        sides = []
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            palettes = ((*mine, Encoding()), (*theirs, Encoding()))  # RAW is the last one
            sides.append(tuple(palettes[0][first].then(palettes[1][second]) for first, second in pairs))
        if self.span != other.span and min(self.span, other.span) > 1:
            raise InputError("both plans join layers, in other numbers", got=f"{self.span} and {other.span}")
        keys, values = sides
        return Store(
            keys, values, index, max(self.sink, other.sink), max(self.recent, other.recent),
            math.lcm(self.block, other.block), max(self.span, other.span),
        )  # fmt: skip

    def check(self, kv_heads: int, width: int) -> None:
        """Raise InputError unless every encoding fits `kv_heads` heads of `width` channels, span by span."""
        for encoding in (*self.keys, *self.values):
            encoding.check(self.span * kv_heads, width)
        if self.span == 1:
            return
        for layer in range(0, len(self.index), self.span):
            used = self.index[layer : layer + self.span]
            if bool((used != used[0, 0]).any()) or (len(used) < self.span and bool((used != RAW).any())):
                raise InputError(
                    f"layers {layer} to {layer + len(used) - 1} cannot be written as one", got=used.tolist(),
                    expected=f"{self.span} layers with one encoding, or none",
                )  # fmt: skip
