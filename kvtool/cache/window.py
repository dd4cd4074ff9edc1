"""Sinks and a ring of recent entries: what left the window is really gone.

Entries stand in slots that are a function of position alone: sinks 0..S−1 first, then a ring of R recent entries, so
eviction is overwriting. Shapes as in `lane.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch

from kvtool.cache.keep.mean import Mean
from kvtool.cache.lane import Lane, Partial, Step, blank
from kvtool.cache.read.board import Board
from kvtool.cache.segments import GROWTH, grown
from kvtool.rotary import Rotary
from kvtool_kernels.bias import hiding
from kvtool_kernels.ops import attend, merge, streaming_prefill

BLOCK = 256  # query rows per block in windowed prefill


class Window(Lane):
    """Sinks and a ring of recent entries; `model_window` is the layer's own sliding window, if it has one.

    With `compensate` dropped entries live on in one averaged entry per head (`Mean`). With `reindex` positions
    are counted inside the cache: the distance to a sink never exceeds S + R, obtained by turning the query rather
    than the keys.
    """

    def __init__(
        self,
        heads: list[int],
        *,
        sink: int,
        recent: int,
        compensate: bool = False,
        reindex: Rotary | None = None,
        model_window: int | None = None,
    ):
        super().__init__(heads)
        if model_window is not None:  # what the model itself never sees need not be held, and cannot be a sink
            sink, recent = 0, min(sink + recent, model_window)
        self.sink, self.recent, self.reindex, self.model_window = sink, recent, reindex, model_window
        self.mean = Mean() if compensate and model_window is None else None
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.fed = 0

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        out = self._decode(q, k, v, step) if q.shape[2] == 1 and step.start else self._chunk(q, k, v, step)
        self.fed = step.start + k.shape[2]
        return out

    # one token: overwrite the entry that leaves the window, then attend over all slots

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        return self._over(q, *self.enter(k, v, step), step.start, step)

    def plain(self, step: Step) -> bool:
        return self.mean is None and self.reindex is None and step.start > 0

    def enter(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        position = step.start
        used = self._reserve(k, position + 1)
        slot = self._slot(position)
        keys, values = self._held()
        if self.mean is not None and position >= self.sink + self.recent:
            self.mean.fold(keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1])
        keys[:, :, slot] = k[:, :, 0]
        values[:, :, slot] = v[:, :, 0]
        self.fed = position + 1
        return keys[:, :, :used], values[:, :, :used]

    def leave(self, q: torch.Tensor, step: Step) -> None:
        """What left the window is overwritten already."""

    def _over(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, step: Step) -> Partial:
        """Attend over slots that are all visible; with `reindex` sinks are met as if from slot S + R − 1 at most."""
        if self.reindex is not None and position >= self.sink + self.recent:
            near = torch.arange(position, position + q.shape[2], device=q.device)[None]
            turned = self.reindex.move(q, near, near - (position - self.sink - self.recent + 1))
            far = attend(turned, keys[:, :, : self.sink], values[:, :, : self.sink], **step.options)
            out = merge(far, attend(q, keys[:, :, self.sink :], values[:, :, self.sink :], **step.options))
        else:
            out = attend(q, keys, values, **step.options)
        return out if self.mean is None else merge(out, self.mean.attend(q, step.scale, step.softcap))

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        near_k, near_v, first = self._near(k, v, self.fed)
        sinks, missing = (k[:, :, :0], v[:, :, :0]), max(0, self.sink - self.fed)
        if self.keys is not None and self.values is not None:
            held = min(self.sink, self.fed)
            sinks = self.keys[:, :, :held], self.values[:, :, :held]
        if missing:
            sinks = torch.cat([sinks[0], k[:, :, :missing]], dim=2), torch.cat([sinks[1], v[:, :, :missing]], dim=2)
        return self._windowed(q, near_k, near_v, first, self.recent, sinks, replace(step, strict=True))

    def over(self, q: torch.Tensor, places: torch.Tensor, step: Step) -> Partial:
        if not self.fed:
            return blank(q)
        if self.model_window is None:  # what was dropped is the nearest, wherever the queries stand
            used = min(self.fed, self.sink + self.recent)
            keys, values = self._held()
            return self._over(q, keys[:, :, :used], values[:, :, :used], self.fed - 1, step)
        k, v, first = self.recall()
        own = torch.arange(first, first + k.shape[2], device=q.device)
        return attend(q, k, v, bias=_hiding(own <= places[:, None] - self.model_window), **step.options)

    # many tokens: [sinks] and [recent entries in order, then the chunk], a block of query rows at a time

    def _chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        end = step.start + k.shape[2]
        near_k, near_v, first = self._near(k, v, step.start)
        self._absorb_sinks(k, v, step.start)
        reach = self.recent if step.strict else self.model_window or end
        if reach >= end and first == 0:  # everything is at hand, and nothing is out of reach
            out = attend(q, near_k, near_v, causal=True, **step.options)
        elif first == 0 and self._in_one(q):
            out = streaming_prefill(
                q, near_k, near_v, sink=self.sink, recent=reach, start=step.start, **step.options,
            )  # fmt: skip
        else:
            keys, values = self._held()
            sinks = min(self.sink, end)
            out = self._windowed(q, near_k, near_v, first, reach, (keys[:, :, :sinks], values[:, :, :sinks]), step)
        self._absorb_recent(near_k, near_v, first)
        return out

    def _in_one(self, q: torch.Tensor) -> bool:
        """Does one kernel attend over sinks and window? On a CPU blocks of rows are the quicker way."""
        return q.is_cuda and self.mean is None and self.reindex is None

    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        near_k, near_v, first = self._near(k, v, step.start)
        self._absorb_sinks(k, v, step.start)
        self._absorb_recent(near_k, near_v, first)
        self.fed = step.start + k.shape[2]

    def recall(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        keys, values = self._held()
        return self._ordered(keys, values, self.fed)

    def _near(self, k: torch.Tensor, v: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Held recent entries and the chunk in order: k, v [B,K,N,D], and the position of the first."""
        held_k, held_v, first = self._ordered(k, v, start)
        return torch.cat([held_k, k], dim=2), torch.cat([held_v, v], dim=2), first

    def _windowed(
        self, q: torch.Tensor, near_k: torch.Tensor, near_v: torch.Tensor, first: int, reach: int,
        sinks: tuple[torch.Tensor, torch.Tensor], step: Step,
    ) -> Partial:  # fmt: skip
        """Each query sees the sinks, its last `reach` entries, and (with compensation) the mean of what is dropped."""
        tokens, offset = q.shape[2], near_k.shape[2] - q.shape[2]
        positions = torch.arange(first, first + near_k.shape[2], device=q.device)
        trail = self.mean.trail(near_k, near_v, positions >= self.sink) if self.mean is not None else None
        pieces = []
        for low in range(0, tokens, BLOCK):
            high = min(low + BLOCK, tokens)
            left = max(0, offset + low - reach + 1)
            seen, own = positions[left : offset + high], positions[offset + low : offset + high]
            block = q[:, :, low:high]
            hidden = (seen > own[:, None]) | (seen <= own[:, None] - reach) | (seen < self.sink)
            recent = (near_k[:, :, left : offset + high], near_v[:, :, left : offset + high])
            if sinks[0].shape[2]:
                sink_hidden = torch.arange(sinks[0].shape[2], device=q.device) > own[:, None]
                if self.reindex is not None:
                    turned = self.reindex.move(block, own[None], self._inside(own, step)[None])
                    out = merge(
                        attend(turned, *sinks, bias=_hiding(sink_hidden), **step.options),
                        attend(block, *recent, bias=_hiding(hidden), **step.options),
                    )
                else:
                    both = [torch.cat(pair, dim=2) for pair in zip(sinks, recent, strict=True)]
                    out = attend(block, *both, bias=_hiding(torch.cat([sink_hidden, hidden], dim=-1)), **step.options)
            else:
                out = attend(block, *recent, bias=_hiding(hidden), **step.options)
            if trail is not None:
                last = torch.arange(offset + low, offset + high, device=q.device) - reach
                out = merge(out, trail.attend(block, last, step.scale, step.softcap))
            pieces.append(out)
        return torch.cat([out for out, _ in pieces], dim=2), torch.cat([lse for _, lse in pieces], dim=2)

    def _inside(self, position: torch.Tensor, step: Step) -> torch.Tensor:
        """Positions [T] counted inside the cache: less what was dropped before the query, or before its whole chunk."""
        if step.strict:
            return position.clamp_max(self.sink + self.recent - 1)
        return position - max(0, step.start - self.sink - self.recent)

    def _ordered(self, k: torch.Tensor, v: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The last held entries (some may be sinks) and the position of the first: [B,K,h,D] twice, int."""
        held = min(start, self.recent)
        if held == 0 or self.keys is None or self.values is None:
            return k[:, :, :0], v[:, :, :0], start
        slots = self._slots(torch.arange(start - held, start, device=k.device))
        return self.keys[:, :, slots], self.values[:, :, slots], start - held

    def _absorb_sinks(self, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        end = start + k.shape[2]
        self._reserve(k, end)
        keys, values = self._held()
        if start < self.sink:
            high = min(end, self.sink)
            keys[:, :, start:high] = k[:, :, : high - start]
            values[:, :, start:high] = v[:, :, : high - start]

    def _absorb_recent(self, near_k: torch.Tensor, near_v: torch.Tensor, first: int) -> None:
        """Write the last R entries into the ring; fold what left the window into the mean."""
        end = first + near_k.shape[2]
        left = max(self.sink, end - self.recent)  # the first position that stays
        if self.mean is not None and first < left:
            dropped = slice(max(self.sink - first, 0), left - first)
            self.mean.fold(near_k[:, :, dropped], near_v[:, :, dropped])
        if left < end:
            keys, values = self._held()
            slots = self._slots(torch.arange(left, end, device=near_k.device))
            keys[:, :, slots] = near_k[:, :, left - end :]
            values[:, :, slots] = near_v[:, :, left - end :]

    def _slot(self, position: int) -> int:
        return position if position < self.sink else self.sink + (position - self.sink) % self.recent

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.where(positions < self.sink, positions, self.sink + (positions - self.sink) % self.recent)

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _reserve(self, like: torch.Tensor, fed: int) -> int:
        """Make room for the slots in use after `fed` tokens; returns how many there are."""
        used = min(fed, self.sink + self.recent)
        if self.keys is None or self.values is None or self.keys.shape[2] < used:
            room = min(used + GROWTH, self.sink + self.recent)
            self.keys, self.values = grown(self.keys, like, room), grown(self.values, like, room)
        return used

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.keys is not None and self.values is not None:
            yield from (self.keys, self.values)
        if self.mean is not None:
            yield from self.mean.buffers()

    def entries(self) -> int:
        return min(self.fed, self.sink + self.recent) + (self.mean is not None and self.mean.count > 0)

    def read_bytes(self) -> int:
        used = min(self.fed, self.sink + self.recent)
        held = [] if self.keys is None or self.values is None else [self.keys, self.values]
        means = 0 if self.mean is None else sum(buffer.nbytes for buffer in self.mean.buffers())
        return sum(buffer.nbytes // buffer.shape[2] * used for buffer in held) + means

    def branch(self) -> Window:
        """The ring is overwritten, so that it is copied."""
        made = copy.copy(self)
        made.mean = copy.copy(self.mean)
        if self.keys is not None and self.values is not None:
            made.keys, made.values = self.keys.clone(), self.values.clone()
        return made

    def meet(self, board: Board) -> None:
        self.reindex = None if self.reindex is None else board.rotary(self.reindex)

    def reorder(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if self.mean is not None:
            self.mean.reorder(rows)


def _hiding(hidden: torch.Tensor) -> torch.Tensor:
    """bool [T,S], True = hidden → additive fp32 bias [1,1,T,S]."""
    return hiding(hidden)[None, None]
