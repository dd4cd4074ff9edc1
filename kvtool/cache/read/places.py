"""At which distance a query meets what it reads, where that is not the entries' own (`Read.positions`).

    contiguous  entries that are read stand side by side, in order, right before the recent ones, and sinks before them:
                what is not read leaves no gap (ReKV, arXiv 2503.00540)
    far         whatever is read stands R tokens before the query, sinks too, without any order among themselves
                (R = `Read.recent`; ActQKV, arXiv 2502.13542, as InfLLM before it)

Keys are held as RoPE turned them, and turned on when they are read; recent entries stay where they are, so that only
distances to what is read change. Where everything is read nothing is turned.

Shapes: B batch, K KV heads of the lane, G query heads of each, C choosers per KV head, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment, entries_of
from kvtool.cache.share.shared import Shared
from kvtool.rotary import Rotary
from kvtool.slots import Read
from kvtool_kernels.ops import attend


class Places:
    """`of(low, high)`: positions of entries of the bulk, int64 [S] or [B,K,S], and below 0 of the sinks; `wanted`, if
    they are ever asked for."""

    def __init__(self, spec: Read, rotary: Rotary):
        self.mode, self.distance, self.rotary = spec.positions, spec.recent, rotary
        self.wanted = spec.bare or spec.positions != "original"
        self.of: Callable[[int, int], torch.Tensor] = lambda low, high: torch.arange(low, high)

    def bare(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [B,K,...,S,D] at positions int64 [S], or [B,K,S] of as many axes, before RoPE."""
        return self.rotary.unrotate(x, self.rotary.table(positions.to(x.device)))

    def keys(self, k: torch.Tensor, read: torch.Tensor, grain: int, length: int) -> torch.Tensor:
        """k [B,K,C·M·grain,D] of the elements `read` int64 [B,K,C,M], the last first, −1 at the end, of a bulk of
        `length` entries, as the query meets them."""
        if self.mode == "original":
            return k
        source = self.of(0, length).to(k.device).expand(*k.shape[:2], -1)
        places = source.gather(2, entries_of(read.clamp_min(0).flatten(2), grain))
        if self.mode == "far":
            target = torch.zeros_like(places)
        else:
            order = torch.arange(read.shape[3], device=k.device).expand_as(read).flatten(2)
            last = source[:, :, -1:, None] + 1  # where the recent entries begin
            target = (last - (order + 1)[..., None] * grain + torch.arange(grain, device=k.device)).flatten(2)
        return self._turned(k, places, target.clamp_min(0))

    def query(self, q: torch.Tensor, step: Step) -> torch.Tensor:
        """The step's query [...,1,D] as it meets `keys`."""
        if self.mode != "far":
            return q
        at = torch.tensor([step.start + step.origin], device=q.device)
        return self._turned(q, at, torch.full_like(at, self.distance))

    def before(self, q: torch.Tensor, sinks: Segment | Shared, gap: torch.Tensor, step: Step) -> Partial:
        """Attend q [B,H,1,D] over the sinks; the bulk's choosers left gap int64 [B,K,C] of its entries unread."""
        if self.mode == "far":
            k, v = sinks.recall()
            first = self.of(-sinks.length, 0).to(k.device)
            return attend(self.query(q, step), self._turned(k, first, torch.zeros_like(first)), v, **step.options)
        batch, kv_heads, choosers = gap.shape
        grouped = q.reshape(batch, kv_heads, choosers, -1, q.shape[-1])
        at = torch.full_like(gap, step.start + step.origin)[..., None]
        turned = self._turned(grouped, at, at - gap[..., None]).reshape(q.shape)
        return sinks.attend(turned, replace(step, given={}))  # which was computed for queries that nobody turned

    def _turned(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """x [...,S,D], whose positions int64 [...,S] are `source`, as if they were `target`."""
        bare = self.rotary.unrotate(x, self.rotary.table(source))
        return self.rotary.rotate(bare, self.rotary.table(target))
