"""Segments: entries of one encoding, in order. A lane's attention is the merge of attention over its segments.

`Dense` holds entries as they come, in a buffer with a little room to grow; `Coded` (see `store/coded.py`) what an
`Encoding` wrote. Neither knows policies: what enters and what leaves is the lane's affair.

Shapes: k, v [B,K,S,D]; q [B,H,T,D] with H = K·G.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from kvtool.cache.keep.closing import FEW, close_up, closes
from kvtool.cache.lane import Partial, Step
from kvtool_kernels.ops import attend, attend_scored, attend_selected

GROWTH = 64  # entries by which a dense buffer grows: the slack that is held but not yet used
HOST = torch.device("cpu")
BLOCK = 2048  # entries decoded at a time where attention cannot read the written form


class Segment(ABC):
    """`length` entries in order.

    `slow`: they live in host memory wherever the model is, and what attention needs of them is fetched from there.
    `moved` counts the bytes fetched; with the model in host memory too nothing moves, but the count is the same.
    """

    length: int = 0
    slow: bool = False
    moved: int = 0
    device: torch.device = HOST  # the model's

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add entries k, v [B,K,S,D] at the end."""

    def faced(self, q: torch.Tensor, step: Step) -> torch.Tensor:
        """q [B,H,T,D] as the entries meet it, which `attend` is to be given."""
        return q

    @abstractmethod
    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        """Every entry is visible to every query."""

    @abstractmethod
    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries low … high − 1 as attention sees them."""

    @abstractmethod
    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        """Only the keys of `recall`."""

    def home(self) -> torch.Tensor:
        """All keys, where they live if that can be: for what looks at them there."""
        return self.keys()

    def apiece(self) -> Iterator[torch.Tensor]:
        """The keys, of one row where rows share them."""
        yield self.keys()

    @abstractmethod
    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the units int64 [B,K,M], `unit` consecutive entries each: k, v [B,K,M·unit,D]."""

    @abstractmethod
    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""

    @abstractmethod
    def reorder(self, rows: torch.Tensor) -> None:
        """Select batch rows."""

    @abstractmethod
    def key_bytes(self) -> int:
        """Bytes of all keys in use."""

    def read_bytes(self) -> int:
        """Bytes of all entries in use."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def some_bytes(self, count: int) -> int:
        """Bytes of so many of the entries of every row and head."""
        return self.read_bytes() * count // self.length

    def page_bytes(self, touched: torch.Tensor, page: int) -> int:
        """Bytes of the pages of `page` entries that each row and head touches, bool [B,K,N]."""
        batch, kv_heads, _ = touched.shape
        return self.read_bytes() * int(touched.sum()) * page // (batch * kv_heads * self.length)

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(HOST) if self.slow else x

    def _fetch(self, x: torch.Tensor) -> torch.Tensor:
        if not self.slow:
            return x
        self.moved += x.nbytes
        return x.to(self.device)


class Dense(Segment):
    """Entries as they come."""

    def __init__(self, *, slow: bool = False) -> None:
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None  # fp32 [B,K,S,1]: entries that each one stands for, where that is not 1
        self.slow = slow

    def append(self, k: torch.Tensor, v: torch.Tensor, most: int | None = None) -> None:
        """`most`: how many entries will be held at once, as far as is known."""
        self.device = k.device
        self.k = _append(self.k, self._put(k), self.length, most)
        self.v = _append(self.v, self._put(v), self.length, most)
        if self.weight is not None:
            one = torch.ones(*k.shape[:3], 1, dtype=torch.float32, device=k.device)
            self.weight = _append(self.weight, one, self.length, most)
        self.length += k.shape[2]

    def state(self) -> dict[str, Any]:
        """What a file holds: the entries, without the room to grow."""
        held = (("k", self.k), ("v", self.v), ("weight", self.weight))
        return {name: x[:, :, : self.length] for name, x in held if x is not None and self.length}

    def restore(self, state: dict[str, Any]) -> None:
        """Hold these entries, where there were none."""
        if state:
            self.k, self.v, self.weight = self._put(state["k"]), self._put(state["v"]), state.get("weight")
            self.length, self.device = state["k"].shape[2], state["k"].device

    def attend(self, q: torch.Tensor, step: Step, *, causal: bool = False) -> Partial:
        """`causal`: the last T entries are the queries' own. Weight n adds log n to an entry's logit."""
        k, v = self.recall()
        if self.weight is None:
            return attend(q, k, v, causal=causal, **step.options)
        bias = self.weight[:, :, : self.length, 0].log()[:, :, None]
        if causal:
            bias = bias.repeat_interleave(q.shape[1] // k.shape[1], 1)
            return attend(q, k, v, causal=True, bias=bias, **step.options)
        rows = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # a KV head's queries share its bias
        out, lse = attend(rows, k, v, bias=bias, **step.options)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])

    def scored(self, q: torch.Tensor, step: Step) -> tuple[Partial, torch.Tensor | None]:
        """As `attend`, of one token, and its logits [B,H,1,S], unless entries stand for several."""
        if self.weight is not None:
            return self.attend(q, step), None
        out, lse, logits = attend_scored(q, *self.recall(), **step.options)
        return (out, lse), logits

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.v is not None
        high = self.length if high is None else high
        return self.keys(low, high), self._fetch(self.v[:, :, low:high])

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        assert self.k is not None
        return self._fetch(self.k[:, :, low : self.length if high is None else high])

    def home(self) -> torch.Tensor:
        assert self.k is not None
        return self.k[:, :, : self.length]

    def pop(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the first `count` entries out; their memory is given back."""
        k, v = self.recall(0, count)
        rest, weight = self.recall(count), self.weight
        self.k = self.v = self.weight = None
        remaining, self.length = self.length - count, 0
        if remaining:
            self.append(*rest)
            self.weight = None if weight is None else weight[:, :, count : count + remaining].clone()
        return k, v

    def cut(self, count: int) -> None:
        """Forget the last `count` entries; their room stays."""
        self.length -= count

    def close(self, first: int, gone: int) -> bool:
        """Let entries first … first + gone − 1 of every head leave, unless a copy of the others is to be preferred."""
        held = self.length
        if any(x.requires_grad or x.shape[2] - held + gone > FEW for x in self.buffers()):
            return False
        for x in self.buffers():
            x[:, :, first : held - gone] = x[:, :, first + gone : held].clone()
        self.length = held - gone
        return True

    def take(self, index: torch.Tensor) -> None:
        """Keep only the entries index int64 [B,K,N], in this order."""
        assert self.k is not None
        assert self.v is not None
        held, self.length = self.length, index.shape[2]
        buffers = (self.k, self.v) if self.weight is None else (self.k, self.v, self.weight)
        if closes(buffers, index, held):
            close_up(buffers, index, held)
            return
        self.k, self.v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (self.k, self.v))
        self.weight = None if self.weight is None else self.weight.gather(2, index[..., None])

    def put(self, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Hold k, v [B,K,E,D] at places int64 [B,K,E]; where told, all stand for counts [B,K,S] entries each."""
        assert self.k is not None
        assert self.v is not None
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer.scatter_(2, places[..., None].expand_as(new), new)
        self.weight = self.weight if counts is None else counts[..., None].contiguous()

    def counts(self) -> torch.Tensor:
        """Entries that each one stands for, fp32 [B,K,S]."""
        assert self.k is not None
        if self.weight is None:
            return torch.ones(*self.k.shape[:2], self.length, dtype=torch.float32, device=self.k.device)
        return self.weight[:, :, : self.length, 0]

    def become(self, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, *, count: bool) -> None:
        """Hold k, v [B,K,S,D] instead; if `count`, standing for counts [B,K,S] entries each."""
        self.k, self.v, self.length = k, v, k.shape[2]
        self.weight = counts[..., None].contiguous() if count else None

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.k is not None
        assert self.v is not None
        units = units.to(self.k.device)
        return self._fetch(_rows(self.k, units, unit)), self._fetch(_rows(self.v, units, unit))

    def in_place(self) -> bool:
        """Does attention over a few entries read them where they lie, instead of a copy?"""
        return self.k is not None and self.k.is_cuda and not self.slow and self.weight is None

    def attend_units(self, q: torch.Tensor, units: torch.Tensor, unit: int, step: Step) -> Partial:
        """Attend q [B,H,1,D] over the entries of units int64 [B,K,M], in place; −1 is none."""
        assert self.k is not None
        assert self.v is not None
        listed = torch.where((units < 0).repeat_interleave(unit, 2), -1, entries_of(units, unit)).int()
        return attend_selected(q, self.k, self.v, listed, **step.options)

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.k is not None and self.v is not None:
            yield from (self.k, self.v)
        if self.weight is not None:
            yield self.weight

    def key_bytes(self) -> int:
        return 0 if self.k is None else self.k.nbytes // self.k.shape[2] * self.length

    def read_bytes(self) -> int:
        return sum(buffer.nbytes // buffer.shape[2] * self.length for buffer in self.buffers())

    def reorder(self, rows: torch.Tensor) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[rows], self.v[rows]
            self.weight = None if self.weight is None else self.weight[rows]


def entries_of(units: torch.Tensor, unit: int) -> torch.Tensor:
    """int64 [B,K,M] units → their entries [B,K,M·unit]."""
    return (units[..., None] * unit + torch.arange(unit, device=units.device)).flatten(2)


def _rows(x: torch.Tensor, units: torch.Tensor, unit: int) -> torch.Tensor:
    """x [B,K,S,D], int64 units [B,K,M] → their entries [B,K,M·unit,D]; whole rows are copied faster than elements."""
    batch, kv_heads, room, width = x.shape
    if room % unit:
        units, unit = entries_of(units, unit), 1
    first = torch.arange(batch * kv_heads, device=x.device).reshape(batch, kv_heads, 1) * (room // unit)
    taken = x.reshape(-1, unit * width).index_select(0, (units + first).flatten())
    return taken.reshape(batch, kv_heads, -1, width)


def _append(buffer: torch.Tensor | None, new: torch.Tensor, start: int, most: int | None) -> torch.Tensor:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        room = -(-end // GROWTH) * GROWTH
        buffer = grown(buffer, new, room if most is None else max(end, min(room, most)))
    buffer[:, :, start:end] = new
    return buffer


def grown(buffer: torch.Tensor | None, like: torch.Tensor, room: int) -> torch.Tensor:
    """A buffer of `room` entries that begins with those of `buffer`."""
    larger = like.new_zeros(like.shape[0], like.shape[1], room, like.shape[3])
    if buffer is not None:
        larger[:, :, : buffer.shape[2]] = buffer
    return larger
