"""Entries of neighbouring layers written as one: a basis or a direction that layers share, or their heads joined.

The layers of a span hand in the entries that leave their raw windows, layer by layer within one call of the network;
with the last one's the pool encodes them together, as if they were one layer with span·K KV heads. A `Member` is what
one layer sees of its pool. Shapes as in `lane.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment
from kvtool.cache.store import latents
from kvtool.cache.store.coded import Coded
from kvtool.encoding.encoding import Encoding


class Pool:
    """The coded entries of `span` layers with `kv_heads` KV heads each."""

    def __init__(self, coded: Coded, span: int, kv_heads: int):
        self.coded, self.span, self.kv_heads = coded, span, kv_heads
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def offer(self, member: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Entries k, v [B,K,S,D] of one member; the last member's call encodes everybody's."""
        self.waiting[member] = (k, v)
        if len(self.waiting) == self.span:
            sides = zip(*(self.waiting[member] for member in range(self.span)), strict=True)
            k, v = (torch.cat(side, dim=1) for side in sides)
            self.waiting = {}
            self.coded.append(k, v)


class Member(Segment):
    """One layer's share of a pool."""

    def __init__(self, pool: Pool, member: int):
        self.pool, self.member = pool, member

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.pool.coded.length

    @property
    def own(self) -> slice:
        """The layer's KV heads within the pool."""
        return slice(self.member * self.pool.kv_heads, (self.member + 1) * self.pool.kv_heads)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pool.offer(self.member, k, v)

    def attend(self, q: torch.Tensor, step: Step) -> Partial:
        """Only the layer's own part of a latent is rebuilt; where kernels read what is written after RoPE, the other
        layers' heads ask nothing."""
        coded = self.pool.coded
        if coded.length and latents.apply(coded, q, self.own):
            return latents.attend(coded, q, step, self.own)
        if coded.length and coded.packed(q, step) is None:
            return coded.by_blocks(q, step, self.recall)
        batch, heads, tokens, width = q.shape
        wide = q.new_zeros(batch, self.pool.span, heads, tokens, width)
        wide[:, self.member] = q
        out, lse = coded.attend(wide.flatten(1, 2), step)
        return out.unflatten(1, (self.pool.span, heads))[:, self.member], lse.unflatten(1, (-1, heads))[:, self.member]

    def recall(self, low: int = 0, high: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.pool.coded.recall(low, high)
        return k[:, self.own], v[:, self.own]

    def keys(self, low: int = 0, high: int | None = None) -> torch.Tensor:
        return self.pool.coded.keys(low, high)[:, self.own]

    def gather(self, units: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        everybody = units.repeat(1, self.pool.span, 1)
        k, v = self.pool.coded.gather(everybody, unit)
        return k[:, self.own], v[:, self.own]

    def buffers(self) -> Iterator[torch.Tensor]:
        """The first member answers for the pool."""
        if self.member == 0:
            yield from self.pool.coded.buffers()
            for pair in self.pool.waiting.values():
                yield from pair

    def key_bytes(self) -> int:
        return self._share(self.pool.coded.key, self.pool.coded.key_bytes())

    def read_bytes(self) -> int:
        coded = self.pool.coded
        return self.key_bytes() + self._share(coded.value, coded.read_bytes() - coded.key_bytes())

    def _share(self, encoding: Encoding, count: int) -> int:
        """What is written as one is read whole by every layer; what is not, each layer's own part of it."""
        return count if encoding.mixes else count // self.pool.span

    def reorder(self, rows: torch.Tensor) -> None:
        if self.member == 0:
            self.pool.coded.reorder(rows)
