"""Segments: entries of one encoding, in order. A lane's attention is the merge of attention over its segments.

`Dense` holds entries as they come, in a buffer with a little room to grow; `Coded` holds what an `Encoding` wrote
and attends over the written form, or block by block over what it decodes where kernels cannot read it. Neither
knows policies: what enters and what leaves is the lane's affair.

Shapes: k, v [B,K,S,D]; q [B,H,T,D] with H = K·G.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.encoding.codecs import Parts
from kvtool.encoding.encoding import Encoding
from kvtool.rotary import Rotary
from kvtool_kernels.ops import attend, attend_packed, merge

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

    @abstractmethod
    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        """Every entry is visible to every query."""

    @abstractmethod
    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries low … high − 1 as attention sees them."""

    @abstractmethod
    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        """Only the keys of `recall`."""

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

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.device = k.device
        self.k = _append(self.k, self._put(k), self.length)
        self.v = _append(self.v, self._put(v), self.length)
        if self.weight is not None:
            one = torch.ones(*k.shape[:3], 1, dtype=torch.float32, device=k.device)
            self.weight = _append(self.weight, one, self.length)
        self.length += k.shape[2]

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

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.v is not None
        high = self.length if high is None else high
        return self.keys(low, high), self._fetch(self.v[:, :, low:high])

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        assert self.k is not None
        return self._fetch(self.k[:, :, low : self.length if high is None else high])

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

    def take(self, index: torch.Tensor) -> None:
        """Keep only the entries index int64 [B,K,N], in this order."""
        self.k, self.v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in self.recall())
        self.length = index.shape[2]
        self.weight = None if self.weight is None else self.weight.gather(2, index[..., None])

    def counts(self) -> torch.Tensor:
        """Entries that each one stands for, fp32 [B,K,S]."""
        assert self.k is not None
        if self.weight is None:
            return torch.ones(*self.k.shape[:2], self.length, device=self.k.device)
        return self.weight[:, :, : self.length, 0]

    def become(self, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, *, count: bool) -> None:
        """Hold k, v [B,K,S,D] instead; if `count`, standing for counts [B,K,S] entries each."""
        self.k, self.v, self.length = k, v, k.shape[2]
        self.weight = counts[..., None].contiguous() if count else None

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.k is not None
        assert self.v is not None
        index = _entries(units, unit)[..., None].to(self.k.device)
        k, v = (self._fetch(x.gather(2, index.expand(-1, -1, -1, x.shape[-1]))) for x in (self.k, self.v))
        return k, v

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


class Coded(Segment):
    """Entries as `key` and `value` write them. Appended once, never written again.

    `rotary` is needed for keys that are stored before RoPE; `positions` gives the position of each entry, int64 [S] or
    [B,K,S], for them.
    """

    def __init__(self, key: Encoding, value: Encoding, rotary: Rotary | None = None, *, slow: bool = False):
        self.key, self.value, self.rotary, self.slow = key, value, rotary, slow
        self.parts: dict[str, Parts] = {}
        self.width = (0, 0)
        self.positions: Callable[[int, int], torch.Tensor] = lambda low, high: torch.arange(low, high)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        count = k.shape[2]
        self.width, self.dtype, self.device = (k.shape[-1], v.shape[-1]), k.dtype, k.device
        if not self.key.rotated:
            k = self._turn(k, self.length, self.length + count, back=True)
        for side, encoding, x in (("key", self.key, k), ("value", self.value, v)):
            made = {n: self._put(tensor) for n, tensor in encoding.encode(x).items()}
            held = self.parts.get(side)
            if held is None:
                self.parts[side] = {n: _own(tensor) for n, tensor in made.items()}
            else:
                self.parts[side] = {n: torch.cat([held[n], made[n]], dim=2) for n in made}
        self.length += count

    def _turn(self, k: torch.Tensor, low: int, high: int, *, back: bool) -> torch.Tensor:
        assert self.rotary is not None
        positions = self.positions(low, high).to(k.device)
        table = self.rotary.table(positions)
        return self.rotary.unrotate(k, table) if back else self.rotary.rotate(k, table)

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        if self.length == 0:
            return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
        keys, values = self.key.packed(self.parts["key"]), self.value.packed(self.parts["value"])
        alike = self.key.joined == self.value.joined
        near = not self.slow and q.dtype != torch.float64  # kernels read the model's memory and compute in fp32
        if keys is not None and values is not None and alike and step.softcap is None and near:
            return self._direct(q, keys, values, step)
        out: Partial | None = None
        block = math.lcm(self.key.block, self.value.block)
        count = max(block, BLOCK - BLOCK % block)
        for low in range(0, self.length, count):
            k, v = self.recall(low, min(low + count, self.length))
            part = attend(q, k, v, **step.options)
            out = part if out is None else merge(out, part)
        assert out is not None
        return out

    def _direct(self, q: torch.Tensor, keys, values, step: Step) -> Partial:
        """Attention over the written form: the query meets ẑ of the keys, and ẑ of the values is turned back once."""
        batch, heads, tokens, width = q.shape
        kv_heads = _heads(keys) * self.key.joined
        rows = heads // kv_heads * tokens
        turned, offset = self.key.query(q.reshape(batch, kv_heads, rows, width))
        flat = turned.reshape(batch, turned.shape[1] * turned.shape[2], 1, turned.shape[3])
        flat = torch.nn.functional.pad(flat, (0, _width(keys) - flat.shape[3]))
        out, lse = attend_packed(flat, keys, values, scale=step.scale)
        if offset is not None:
            lse = lse + step.scale * offset.reshape(lse.shape)
        inner = self.value_width()
        out = out.reshape(batch, turned.shape[1], turned.shape[2], -1)[..., :inner]
        out = self.value.output(out, rows)
        return out.reshape(batch, heads, tokens, -1).to(q.dtype), lse.reshape(batch, heads, tokens)

    def value_width(self) -> int:
        """r of the values: their written width without padding."""
        width = self.width[1]
        for step in self.value.transforms:
            width = step.width(width)
        return width

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded entries; `low` must stand at a block's border."""
        high = self.length if high is None else high
        v = self.value.decode(self._cut("value", self.value, low, high), self.width[1])
        return self.keys(low, high), v[:, :, : high - low].to(self.dtype)

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        high = self.length if high is None else high
        k = self.key.decode(self._cut("key", self.key, low, high), self.width[0])[:, :, : high - low].to(self.dtype)
        return k if self.key.rotated else self._turn(k, low, high, back=False)

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Only the chosen units are decoded, as long as no transform mixes heads, whose units differ."""
        block = math.lcm(self.key.block, self.value.block)
        if unit % block or self.key.joined > 1 or self.value.joined > 1:
            index = _entries(units, unit)[..., None]
            k, v = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in self.recall())
            return k, v
        sides = []
        for side, encoding, width in (("key", self.key, self.width[0]), ("value", self.value, self.width[1])):
            chosen = {n: self._units(t, units, unit) for n, t in self.parts[side].items()}
            sides.append(encoding.decode(chosen, width).to(self.dtype))
        if not self.key.rotated:
            assert self.rotary is not None
            held = self.positions(0, self.length).to(units.device)
            index = _entries(units, unit)
            positions = held[index] if held.dim() == 1 else held.gather(2, index)
            sides[0] = self.rotary.rotate(sides[0], self.rotary.table(positions))
        return sides[0], sides[1]

    def _units(self, part: torch.Tensor, units: torch.Tensor, unit: int) -> torch.Tensor:
        """The chosen units' share of a part [B,K,S/per,...], of which an index holds `per` entries."""
        index = _entries(units, unit * part.shape[2] // self.length).to(part.device)
        index = index.reshape(*index.shape, *[1] * (part.dim() - 3)).expand(*index.shape, *part.shape[3:])
        plain = part if part.itemsize > 1 else part.view(torch.uint8)  # torch gathers no 8-bit floats
        return self._fetch(plain.gather(2, index).view(part.dtype))

    def _cut(self, side: str, encoding: Encoding, low: int, high: int) -> Parts:
        """The parts of the blocks that hold entries low … high − 1."""
        assert low % encoding.block == 0
        high = min(-(-high // encoding.block) * encoding.block, self.length)
        cut = {}
        for name, tensor in self.parts[side].items():
            per = self.length // tensor.shape[2]  # entries that share one index of axis 2
            cut[name] = self._fetch(tensor[:, :, low // per : -(-high // per)])
        return cut

    def buffers(self) -> Iterator[torch.Tensor]:
        for parts in self.parts.values():
            yield from parts.values()

    def key_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts.get("key", {}).values())

    def reorder(self, rows: torch.Tensor) -> None:
        self.parts = {side: {n: t[rows] for n, t in parts.items()} for side, parts in self.parts.items()}


def _entries(units: torch.Tensor, unit: int) -> torch.Tensor:
    """int64 [B,K,M] units → their entries [B,K,M·unit]."""
    return (units[..., None] * unit + torch.arange(unit, device=units.device)).flatten(2)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: a view would keep alive what it looks into."""
    return tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _heads(side) -> int:
    return side.shape[1] if isinstance(side, torch.Tensor) else side.codes.shape[1]


def _width(side) -> int:
    return side.shape[-1] if isinstance(side, torch.Tensor) else side.width


def _append(buffer: torch.Tensor | None, new: torch.Tensor, start: int) -> torch.Tensor:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        buffer = grown(buffer, new, -(-end // GROWTH) * GROWTH)
    buffer[:, :, start:end] = new
    return buffer


def grown(buffer: torch.Tensor | None, like: torch.Tensor, room: int) -> torch.Tensor:
    """A buffer of `room` entries that begins with those of `buffer`."""
    larger = like.new_zeros(like.shape[0], like.shape[1], room, like.shape[3])
    if buffer is not None:
        larger[:, :, : buffer.shape[2]] = buffer
    return larger
