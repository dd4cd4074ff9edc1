"""Entries as an `Encoding` wrote them: attention over the written form, or over what it decodes, block by block, where
kernels cannot read it. Shapes: k, v [B,K,S,D]; q [B,H,T,D] with H = K·G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment, entries_of
from kvtool.cache.store import latents
from kvtool.encoding.codecs import Parts
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.squeeze import squeezed
from kvtool.records import tensors_of
from kvtool.rotary import Rotary
from kvtool_kernels.ops import attend, attend_packed, merge

Recall = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
BLOCK = 2048  # entries decoded at a time where attention cannot read the written form


class Coded(Segment):
    """Entries as `key` and `value` write them. Appended once, never written again.

    `rotary` is needed for keys that are stored before RoPE; `positions` gives the position of each entry, int64 [S] or
    [B,K,S], for them. An encoding that fits itself to a prompt does so to the first entries that come, for which
    `queries` gives those that were observed, [1,K,N,D].
    """

    def __init__(self, key: Encoding, value: Encoding, rotary: Rotary | None = None, *, slow: bool = False):
        self.key, self.value, self.rotary, self.slow = key, value, rotary, slow
        self.parts: dict[str, Parts] = {}
        self.own: list[torch.Tensor] = []  # what was fitted
        self.width = (0, 0)
        self.positions: Callable[[int, int], torch.Tensor] = lambda low, high: torch.arange(low, high)
        self.queries: Callable[[], torch.Tensor | None] = lambda: None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        count = k.shape[2]
        self.width, self.dtype, self.device = (k.shape[-1], v.shape[-1]), k.dtype, k.device
        if not self.key.rotated:
            k = self._turn(k, self.length, self.length + count, back=True)
        if self.value.joint:
            k = torch.cat([k, self._still(k, self.positions(self.length, self.length + count)), v], -1)
            self.width = (k.shape[-1], v.shape[-1])
        if count and (self.key.fits or self.value.fits):
            self._fit(k, v)
        for side, encoding, x in (("key", self.key, k), ("value", self.value, v)):
            made = {n: self._put(tensor) for n, tensor in encoding.encode(x).items()}
            held = self.parts.get(side)
            if held is None:
                self.parts[side] = {n: _owned(tensor) for n, tensor in made.items()}
            else:
                self.parts[side] = {n: torch.cat([held[n], made[n]], dim=2) for n in made}
        self.length += count

    def _fit(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Make the encodings those of this prompt; what they are made of is held from now on."""
        assert len(k) == 1
        sides = []
        for encoding, x, q in ((self.key, k, self.queries()), (self.value, v, None)):
            made = encoding.fitted(x, q) if encoding.fits else encoding
            planned = {id(tensor) for tensor in tensors_of(encoding)}
            self.own += [tensor for tensor in tensors_of(made) if id(tensor) not in planned]
            sides.append(made)
        self.key, self.value = sides

    def state(self) -> dict[str, Any]:
        """What a file holds: the parts, codes entropy-coded, and encodings that fitted themselves."""
        if not self.length:
            return {}
        sides, own = (("key", self.key), ("value", self.value)), {id(tensor) for tensor in self.own}
        return {
            "length": self.length, "width": self.width, "like": torch.empty(0, dtype=self.dtype),
            "parts": {side: squeezed(encoding.codec, self.parts[side]) for side, encoding in sides},
            "fitted": (self.key, self.value) if self.own else None,
            "own": tuple(at for at, tensor in enumerate(tensors_of((self.key, self.value))) if id(tensor) in own),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Hold these entries, where there were none; codes come unpacked."""
        if not state:
            return
        self.length, self.width = state["length"], tuple(state["width"])
        self.dtype, self.device = state["like"].dtype, state["like"].device
        self.parts = {side: {n: self._put(x) for n, x in parts.items()} for side, parts in state["parts"].items()}
        if state["fitted"] is not None:
            self.key, self.value = state["fitted"]
            self.own = [tensors_of(state["fitted"])[at] for at in state["own"]]

    def hand_on(self, count: int, to: Coded) -> None:
        """Move the first `count` entries, whole blocks, on to `to`, which stores keys on the same side of RoPE."""
        assert self.key.rotated == to.key.rotated
        to.width, to.dtype, to.device = self.width, self.dtype, self.device
        sides = (("key", self.key, to.key, self.width[0]), ("value", self.value, to.value, self.width[1]))
        for side, mine, theirs, width in sides:
            parts = self.cut(side, mine, 0, count)
            made = mine.coarser(parts, theirs)
            if made is None:
                made = theirs.encode(mine.decode(parts, width).to(self.dtype))
            held = to.parts.get(side)
            to.parts[side] = {n: _owned(t) if held is None else torch.cat([held[n], t], dim=2) for n, t in made.items()}
            rest = {n: t[:, :, count // (self.length // t.shape[2]) :] for n, t in self.parts[side].items()}
            self.parts[side] = {n: t.clone() for n, t in rest.items()}
        self.length -= count
        to.length += count

    def _turn(self, k: torch.Tensor, low: int, high: int, *, back: bool) -> torch.Tensor:
        assert self.rotary is not None
        positions = self.positions(low, high).to(k.device)
        table = self.rotary.table(positions)
        return self.rotary.unrotate(k, table) if back else self.rotary.rotate(k, table)

    def _still(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [B,·,S,D] of these positions, turned to position 0."""
        assert self.rotary is not None
        positions = positions.to(x.device)
        table, start = self.rotary.table(positions), self.rotary.table(torch.zeros_like(positions))
        return self.rotary.rotate(self.rotary.unrotate(x, table), start)

    def faced(self, q: torch.Tensor, step: Step) -> torch.Tensor:
        """With what stands at position 0, and nothing to ask of values, where an entry is written as a whole."""
        if not self.value.joint:
            return q
        return torch.cat([q, self._still(q, step.positions(q.shape[2])), torch.zeros_like(q)], -1)

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        if self.length == 0:
            return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
        if latents.apply(self, q):
            return latents.attend(self, q, step)
        packed = self.packed(q, step)
        if packed is not None:
            return self._direct(q, *packed, step)
        if not self.value.joint:
            return self.by_blocks(q, step, self.recall)
        out, lse = self.by_blocks(q, step, lambda low, high: (self.keys(low, high),) * 2)
        return out[..., -self.width[1] :], lse

    def packed(self, q: torch.Tensor, step: Step) -> tuple[Any, Any] | None:
        """Keys and values as kernels read them, or None when entries must be decoded for q."""
        alike = self.value.joint or self.key.joined == self.value.joined
        near = not self.slow and q.dtype != torch.float64  # kernels read the model's memory and compute in fp32
        if not (alike and near and step.softcap is None):
            return None
        keys = self.key.packed(self.parts["key"])
        values = keys if self.value.joint else self.value.packed(self.parts["value"])
        return None if keys is None or values is None else (keys, values)

    def by_blocks(self, q: torch.Tensor, step: Step, recall: Recall) -> Partial:
        """Attention over what `recall` decodes, block by block."""
        out: Partial | None = None
        for low, high in self.blocks():
            part = attend(q, *recall(low, high), **step.options)
            out = part if out is None else merge(out, part)
        assert out is not None
        return out

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The borders of what is decoded at a time, whole blocks of either side's encoding."""
        block = math.lcm(self.key.block, self.value.block)
        count = max(block, BLOCK - BLOCK % block)
        for low in range(0, self.length, count):
            yield low, min(low + count, self.length)

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
        side, wide = (self.key, self.width[0]) if self.value.joint else (self.value, self.width[1])
        out = out.reshape(batch, turned.shape[1], turned.shape[2], -1)[..., : side.written(wide)]
        out = side.output(out, rows)[..., -self.width[1] :]
        return out.reshape(batch, heads, tokens, -1).to(q.dtype), lse.reshape(batch, heads, tokens)

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded entries; `low` must stand at a block's border."""
        if self.value.joint:
            k = self.keys(low, high)
            return k, k[..., -self.width[1] :]
        high = self.length if high is None else high
        v = self.value.decode(self.cut("value", self.value, low, high), self.width[1])
        return self.keys(low, high), v[:, :, : high - low].to(self.dtype)

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        high = self.length if high is None else high
        k = self.key.decode(self.cut("key", self.key, low, high), self.width[0])[:, :, : high - low].to(self.dtype)
        return k if self.key.rotated else self._turn(k, low, high, back=False)

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Only the chosen units are decoded, once for each of the heads that a transform mixes, whose units differ."""
        block = math.lcm(self.key.block, self.value.block)
        if unit % block:
            index = entries_of(units, unit)[..., None]
            k, v = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in self.recall())
            return k, v
        sides = []
        for side, encoding, width in (("key", self.key, self.width[0]), ("value", self.value, self.width[1])):
            mixed = encoding.joined
            each = []
            for head in range(mixed):
                own = units[:, head::mixed]
                chosen = {n: self._units(t, own, unit) for n, t in self.parts[side].items()}
                each.append(encoding.decode(chosen, width)[:, head::mixed].to(self.dtype))
            sides.append(torch.stack(each, 2).flatten(1, 2))
        if not self.key.rotated:
            assert self.rotary is not None
            held = self.positions(0, self.length).to(units.device)
            index = entries_of(units, unit)
            positions = held[index] if held.dim() == 1 else held.gather(2, index)
            sides[0] = self.rotary.rotate(sides[0], self.rotary.table(positions))
        return sides[0], sides[1]

    def _units(self, part: torch.Tensor, units: torch.Tensor, unit: int) -> torch.Tensor:
        """The chosen units' share of a part [B,K,S/per,...], of which an index holds `per` entries."""
        index = entries_of(units, unit * part.shape[2] // self.length).to(part.device)
        index = index.reshape(*index.shape, *[1] * (part.dim() - 3)).expand(*index.shape, *part.shape[3:])
        plain = part if part.itemsize > 1 else part.view(torch.uint8)  # torch gathers no 8-bit floats
        return self._fetch(plain.gather(2, index).view(part.dtype))

    def cut(self, side: str, encoding: Encoding, low: int, high: int) -> Parts:
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
        yield from self.own

    def key_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts.get("key", {}).values())

    def reorder(self, rows: torch.Tensor) -> None:
        self.parts = {side: {n: t[rows] for n, t in parts.items()} for side, parts in self.parts.items()}


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: a view would keep alive what it looks into."""
    return tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _heads(side) -> int:
    return side.shape[1] if isinstance(side, torch.Tensor) else side.codes.shape[1]


def _width(side) -> int:
    return side.shape[-1] if isinstance(side, torch.Tensor) else side.width
