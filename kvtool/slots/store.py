"""The slot store: how an entry is encoded. L layers, K KV heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.encoding.codecs import SIDES
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
    first: int32 [L]: the first layer of the span that a layer belongs to. The n layers of a span follow one another,
        use one pair in every head, and are written as one with n·K KV heads, the first layer's before the second's.
        None: every layer is a span of its own.
    older, held: precision by age: once more than `held` coded entries are there, the oldest block moves on to what
        `older` says, whose own windows mean nothing.
    once: only the prompt is encoded, by encodings that fit themselves to it; what is decoded later stays raw.
    rest: how entries are held that a selection drops (`Keep.select`), instead of freed; its windows mean nothing.

    Where a value's codec is `WithKeys`, its key's encoding writes both, and is as wide as both.
    """

    keys: tuple[Encoding, ...]
    values: tuple[Encoding, ...]
    index: torch.Tensor
    sink: int = 0
    recent: int = 0
    block: int = 32
    first: torch.Tensor | None = None
    held: int = 0
    once: bool = False
    older: Store | None = None
    rest: Store | None = None

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise InputError("encodings come in pairs", got=f"{len(self.keys)} for keys, {len(self.values)} for values")
        for encoding in (*self.keys, *self.values):
            if self.block < 1 or self.block % encoding.block:
                raise InputError("bad block", got=self.block, expected=f"a multiple of {encoding.block} entries")
        if self.once and not self.fits:
            raise InputError("a store that encodes the prompt alone has nothing to fit to it", got="once")
        if self.older is not None:
            self._check_older(self.older)
        if self.first is not None:
            follows = self.first[1:] == self.first[:-1]  # a layer goes on with the span before it, or begins its own
            begins = self.first[1:] == torch.arange(1, len(self.first))
            if len(self.first) != len(self.index) or int(self.first[0]) or not bool((follows | begins).all()):
                raise InputError("bad spans", got=self.first.tolist(), expected="the first layer of each one's span")
        if self.older is not None and (self.spans or self.older.spans):
            raise InputError("layers that are written as one are written once, whatever the age of an entry")

    def _check_older(self, older: Store) -> None:
        sides = {encoding.rotated for encoding in (*self.keys, *older.keys)}
        if self.block % older.block or len(sides) > 1 or older.fits or not torch.equal(self.index < 0, older.index < 0):
            raise InputError(
                "older entries cannot be written like that", got=f"blocks of {older.block} after {self.block}",
                expected="the same heads, keys on the same side of RoPE, blocks that divide the younger ones'",
            )  # fmt: skip

    def span(self, layer: int) -> list[int]:
        """The layers that are written as one with this one, itself included."""
        return [layer] if self.first is None else (self.first == self.first[layer]).nonzero().flatten().tolist()

    @property
    def spans(self) -> list[list[int]]:
        """Spans of several layers that are encoded."""
        found = [self.span(layer) for layer in range(len(self.index)) if self.span(layer)[0] == layer]
        return [span for span in found if len(span) > 1 and bool((self.index[span] != RAW).any())]

    def layer(self, number: int) -> list[Encoding]:
        """The encodings that some head of this layer uses."""
        pairs = [pair for pair in self.index[number].unique().tolist() if pair != RAW]
        return [side[pair] for pair in pairs for side in (self.keys, self.values)]

    @property
    def used(self) -> list[Encoding]:
        """The encodings that some head uses."""
        pairs = [pair for pair in self.index.unique().tolist() if pair != RAW]
        return [side[pair] for pair in pairs for side in (self.keys, self.values)]

    @property
    def chain(self) -> list[Store]:
        """This store, and those of older and of dropped entries."""
        beyond = [store.chain for store in (self.older, self.rest) if store is not None]
        return [self, *(store for chain in beyond for store in chain)]

    @property
    def lossless(self) -> bool:
        own = all(encoding.lossless for encoding in self.used)
        return own and self.rest is None and (self.older is None or self.older.lossless)

    @property
    def joint(self) -> bool:
        """Does any head write values with keys?"""
        return any(encoding.joint for store in self.chain for encoding in store.used)

    @property
    def fits(self) -> bool:
        """Does any encoding fit itself to the prompt, which must then be in first?"""
        return any(encoding.fits for store in self.chain for encoding in store.used)

    @property
    def observed(self) -> int:
        """How many of a prompt's newest queries the fits look at; −1 all."""
        each = [encoding.observed for store in self.chain for encoding in store.used]
        return -1 if -1 in each else max(each, default=0)

    def then(self, other: Store) -> Store:
        """Both encodings, one after the other, for every KV head; the longer windows, blocks that suit both, and the
        spans of both."""
        pairs: dict[tuple[int, int], int] = {}
        index = torch.full_like(self.index, RAW)
        for at in torch.cartesian_prod(*(torch.arange(size) for size in self.index.shape)).tolist():
            pair = (int(self.index[tuple(at)]), int(other.index[tuple(at)]))
            if pair != (RAW, RAW):
                index[tuple(at)] = pairs.setdefault(pair, len(pairs))
        sides = []
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            palettes = ((*mine, Encoding()), (*theirs, Encoding()))  # RAW is the last one
            sides.append(tuple(palettes[0][first].then(palettes[1][second]) for first, second in pairs))
        keys, values = sides
        return Store(
            keys, values, index, max(self.sink, other.sink), max(self.recent, other.recent),
            math.lcm(self.block, other.block), self._merged(other), **self._beyond(other),
        )  # fmt: skip

    def _beyond(self, other: Store) -> dict[str, Any]:
        """What both say of older entries, and of those that are dropped."""
        if (self.older and other.older) or (self.rest and other.rest):
            raise InputError(
                "both plans say how older entries, or dropped ones, are held", remedy="compose only one such plan"
            )
        older = self.older.then(other) if self.older else self.then(other.older) if other.older else None
        return {
            "held": max(self.held, other.held), "once": self.once or other.once, "older": older,
            "rest": self.rest or other.rest,
        }  # fmt: skip

    def _merged(self, other: Store) -> torch.Tensor | None:
        """`first` with the spans of both."""
        if not (self.spans and other.spans):
            return self.first if self.spans else other.first
        first = torch.arange(len(self.index), dtype=torch.int32)
        for span in (*self.spans, *other.spans):
            clash = [mine for mine in self.spans if set(mine) & set(span) and mine != span]
            if clash:
                raise InputError("both plans join layers, but not the same ones", got=f"{clash[0]} and {span}")
            first[span] = span[0]
        return first

    def check(self, kv_heads: int, width: int) -> None:
        """Raise InputError unless every encoding fits `kv_heads` heads of `width` channels in each layer of a span that
        uses it."""
        for beyond in (self.older, self.rest):
            if beyond is not None:
                beyond.check(kv_heads, width)
        wanted: set[tuple[int, int]] = set()
        for layer in range(len(self.index)):
            span = self.span(layer)
            used = self.index[span]
            if len(span) > 1 and bool((used != used[0, 0]).any()):
                raise InputError(
                    f"layers {span[0]} to {span[-1]} cannot be written as one", got=used.tolist(),
                    expected="one pair of encodings in all of their heads, or none",
                )  # fmt: skip
            wanted |= {(number, len(span)) for number in used.unique().tolist() if number != RAW}
        for number, layers in sorted(wanted):
            sides = SIDES if self.values[number].joint else 1
            self.keys[number].check(layers * kv_heads, sides * width)
            self.values[number].check(layers * kv_heads, width)
