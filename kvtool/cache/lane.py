"""A lane holds the entries of those KV heads of one layer that share a policy, and attends over them.

Columns count tokens as fed, padding included; a row's position is its column minus its left padding. Entries of a
`Full` lane stand in column order. Entries of a `Window` lane stand in slots that are a function of position
alone: sinks 0..S−1 first, then a ring of R recent entries, so eviction is overwriting and a dropped entry's bytes
are really gone.

Shapes: B batch, K KV heads of this lane, H = K·G their query heads, T tokens of this step, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.cache.mean import Mean
from kvtool.rotary import Rotary
from kvtool_kernels.ops import attend, merge

Partial = tuple[torch.Tensor, torch.Tensor]
GROWTH = 64  # entries by which a full buffer grows: the slack that is held but not yet used
BLOCK = 256  # query rows per block in windowed prefill


@dataclass(frozen=True)
class Step:
    """One call's circumstances. `start`: columns seen before; `padding`: int64 [B] left padding per row, or None."""

    start: int
    scale: float
    softcap: float | None
    padding: torch.Tensor | None
    strict: bool  # windowed heads see only their window in prefill too; else their window and the whole chunk

    @property
    def options(self) -> dict[str, Any]:
        """What every call of `attend` is given."""
        return {"scale": self.scale, "softcap": self.softcap}


class Lane(ABC):
    """Entries of the KV heads `heads` (indices within the layer)."""

    def __init__(self, heads: list[int]):
        self.heads = heads

    @abstractmethod
    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """Attend q [B,H,T,D] over the held entries and the new k, v [B,K,T,D], then keep what the policy keeps."""

    @abstractmethod
    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Keep what the policy keeps of k, v [B,K,T,D], attending to nothing."""

    @abstractmethod
    def recall(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The unpadded entries held after `columns` tokens, in column order: k, v [B,K,N,D], the first one's column."""

    @abstractmethod
    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor held, for the byte ledger."""

    @abstractmethod
    def entries(self, columns: int) -> int:
        """Entries per KV head that a decode step reads after `columns` tokens."""

    @abstractmethod
    def clear(self) -> None:
        """Drop everything."""

    @abstractmethod
    def reorder(self, rows: torch.Tensor) -> None:
        """Select batch rows (beam search)."""


class Full(Lane):
    """Every entry stays."""

    def __init__(self, heads: list[int]):
        super().__init__(heads)
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        self.absorb(k, v, step)
        keys, values, _ = self.recall(step.start + k.shape[2])
        bias = None
        if step.padding is not None:
            bias = _hide(torch.arange(keys.shape[2], device=q.device) < step.padding[:, None])[:, None, None]
        return attend(q, keys, values, causal=q.shape[2] > 1, bias=bias, **step.options)

    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        self.keys = _append(self.keys, k, step.start)
        self.values = _append(self.values, v, step.start)

    def recall(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, :columns], self.values[:, :, :columns], 0

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.keys is not None and self.values is not None:
            yield from (self.keys, self.values)

    def entries(self, columns: int) -> int:
        return columns

    def clear(self) -> None:
        self.keys = self.values = None

    def reorder(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


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

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        return self._decode(q, k, v, step) if q.shape[2] == 1 and step.start else self._chunk(q, k, v, step)

    # one token: overwrite the entry that leaves the window, then attend over all slots

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        batch = q.shape[0]
        position = step.start - _padding(q, step)
        used = self._reserve(k, step.start + 1)
        rows, slot = torch.arange(batch, device=q.device), self._slot(position)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if self.mean is not None:
            leaving = position >= self.sink + self.recent
            self.mean.fold(keys[rows, :, slot], values[rows, :, slot], leaving)
        keys[rows, :, slot] = k[:, :, 0]
        values[rows, :, slot] = v[:, :, 0]
        bias = None
        if step.padding is not None:
            bias = _hide(torch.arange(used, device=q.device) > position[:, None])[:, None, None]
        if self.reindex is not None and bool((position >= self.sink + self.recent).any()):
            out = self._reindexed(q, keys[:, :, :used], values[:, :, :used], position[:, None], bias, step)
        else:
            out = attend(q, keys[:, :, :used], values[:, :, :used], scale=step.scale, bias=bias, softcap=step.softcap)
        return out if self.mean is None else merge(out, self.mean.attend(q, step.scale, step.softcap))

    def _reindexed(self, q, keys, values, position, bias, step: Step) -> Partial:
        """Sinks are met by the query as if it stood at slot min(position, S + R − 1)."""
        turned = self.reindex.move(q, position, position.clamp_max(self.sink + self.recent - 1))  # type: ignore[union-attr]
        s, options = self.sink, step.options
        far = attend(turned, keys[:, :, :s], values[:, :, :s], bias=None if bias is None else bias[..., :s], **options)
        own = attend(q, keys[:, :, s:], values[:, :, s:], bias=None if bias is None else bias[..., s:], **options)
        return merge(far, own)

    def _inside(self, position: torch.Tensor, step: Step) -> torch.Tensor:
        """Positions [B,T] counted inside the cache: less what was dropped before the query, or before its whole
        chunk."""
        if step.strict:
            return position.clamp_max(self.sink + self.recent - 1)
        fed = step.start - _padding(position, step)
        return position - (fed - self.sink - self.recent).clamp_min(0)[:, None]

    # many tokens: [sinks] and [recent entries in column order, then the chunk], a block of query rows at a time

    def _chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        end = step.start + k.shape[2]
        columns_k, columns_v, positions = self._columns(k, v, step)
        self._absorb_sinks(k, v, step)
        reach = self.recent if step.strict else self.model_window or end
        if reach >= end and columns_k.shape[2] == end:  # the columns are everything, and nothing is out of reach
            bias = None if step.padding is None else _hide(positions < 0)[:, None, None]
            out = attend(q, columns_k, columns_v, causal=True, bias=bias, **step.options)
        else:
            out = self._windowed(q, columns_k, columns_v, positions, reach, step)
        self._absorb_recent(columns_k, columns_v, positions)
        return out

    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        columns_k, columns_v, positions = self._columns(k, v, step)
        self._absorb_sinks(k, v, step)
        self._absorb_recent(columns_k, columns_v, positions)

    def recall(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        assert self.keys is not None
        assert self.values is not None
        padding = torch.zeros(len(self.keys), dtype=torch.long, device=self.keys.device)
        return self._ordered(self.keys, self.values, columns, padding)

    def _columns(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Held recent entries and the chunk in column order: k, v [B,K,N,D], and their positions [B,N]."""
        padding = _padding(k, step)
        held_k, held_v, first = self._ordered(k, v, step.start, padding)
        positions = torch.arange(first, step.start + k.shape[2], device=k.device) - padding[:, None]
        return torch.cat([held_k, k], dim=2), torch.cat([held_v, v], dim=2), positions

    def _windowed(self, q, columns_k, columns_v, positions, reach: int, step: Step) -> Partial:
        """Each query sees the sinks, its last `reach` entries, and (with compensation) the mean of what is dropped."""
        tokens, offset = q.shape[2], columns_k.shape[2] - q.shape[2]
        sinks = min(self.sink, self.keys.shape[2]) if self.keys is not None else 0
        trail = self.mean.trail(columns_k, columns_v, positions >= self.sink) if self.mean is not None else None
        pieces = []
        for low in range(0, tokens, BLOCK):
            high = min(low + BLOCK, tokens)
            left = max(0, offset + low - reach + 1)
            seen = positions[:, left : offset + high]
            own = positions[:, offset + low : offset + high]
            block = q[:, :, low:high]
            hidden = (
                (seen[:, None] > own[..., None])
                | (seen[:, None] <= own[..., None] - reach)
                | (seen < self.sink)[:, None]
            )
            recent = (columns_k[:, :, left : offset + high], columns_v[:, :, left : offset + high])
            options = step.options
            if sinks:
                slots = torch.arange(sinks, device=q.device)
                sink_hidden = slots > own[..., None]
                sink = (self.keys[:, :, :sinks], self.values[:, :, :sinks])  # type: ignore[index]
                if self.reindex is not None:
                    turned = self.reindex.move(block, own, self._inside(own, step))
                    out = merge(
                        attend(turned, *sink, bias=_hide(sink_hidden)[:, None], **options),
                        attend(block, *recent, bias=_hide(hidden)[:, None], **options),
                    )
                else:
                    both = [torch.cat(pair, dim=2) for pair in zip(sink, recent, strict=True)]
                    out = attend(block, *both, bias=_hide(torch.cat([sink_hidden, hidden], dim=-1))[:, None], **options)
            else:
                out = attend(block, *recent, bias=_hide(hidden)[:, None], **options)
            if trail is not None:
                last = torch.arange(offset + low, offset + high, device=q.device) - reach
                out = merge(out, trail.attend(block, last, step.scale, step.softcap))
            pieces.append(out)
        return torch.cat([out for out, _ in pieces], dim=2), torch.cat([lse for _, lse in pieces], dim=2)

    def _ordered(self, k, v, start: int, padding: torch.Tensor):
        """The last held columns (some may be sinks) and the number of the first: [B,K,h,D] twice, int."""
        held = min(start, self.recent)
        if held == 0 or self.keys is None:
            return k[:, :, :0], v[:, :, :0], start
        columns = torch.arange(start - held, start, device=k.device)
        slot = self._slot((columns - padding[:, None]).clamp_min(0))
        index = slot[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return self.keys.gather(2, index), self.values.gather(2, index), start - held  # type: ignore[union-attr]

    def _absorb_sinks(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        start = step.start
        self._reserve(k, start + k.shape[2])
        for row, pad in enumerate(_padding(k, step).tolist()):
            low, high = max(start - pad, 0), min(start + k.shape[2] - pad, self.sink)
            if low < high:
                chunk = slice(low + pad - start, high + pad - start)
                self.keys[row, :, low:high] = k[row, :, chunk]  # type: ignore[index]
                self.values[row, :, low:high] = v[row, :, chunk]  # type: ignore[index]

    def _absorb_recent(self, columns_k: torch.Tensor, columns_v: torch.Tensor, positions: torch.Tensor) -> None:
        """Write the last R entries into the ring; fold what left the window into the mean."""
        if self.mean is not None:
            dropped = (positions >= self.sink) & (positions <= positions[:, -1:] - self.recent)
            self.mean.fold_many(columns_k, columns_v, dropped)
        for row in range(len(positions)):
            tail = positions[row, -self.recent :]
            kept = tail[tail >= self.sink]
            if len(kept):
                slots = self._slot(kept)
                self.keys[row, :, slots] = columns_k[row, :, -len(kept) :]  # type: ignore[index]
                self.values[row, :, slots] = columns_v[row, :, -len(kept) :]  # type: ignore[index]

    def _slot(self, position: torch.Tensor) -> torch.Tensor:
        return torch.where(position < self.sink, position, self.sink + (position - self.sink) % self.recent)

    def _reserve(self, like: torch.Tensor, columns: int) -> int:
        """Make room for the slots in use after `columns` tokens; returns how many there are."""
        used = min(columns, self.sink + self.recent)
        if self.keys is None or self.values is None or self.keys.shape[2] < used:
            room = min(used + GROWTH, self.sink + self.recent)
            self.keys, self.values = _grown(self.keys, like, room), _grown(self.values, like, room)
        return used

    def buffers(self) -> Iterator[torch.Tensor]:
        if self.keys is not None and self.values is not None:
            yield from (self.keys, self.values)
        if self.mean is not None:
            yield from self.mean.buffers()

    def entries(self, columns: int) -> int:
        return min(columns, self.sink + self.recent) + (self.mean is not None and columns > self.sink + self.recent)

    def clear(self) -> None:
        self.keys = self.values = None
        self.mean = None if self.mean is None else Mean()

    def reorder(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if self.mean is not None:
            self.mean.reorder(rows)


def _padding(like: torch.Tensor, step: Step) -> torch.Tensor:
    """Left padding per row, int64 [B]."""
    return torch.zeros(len(like), dtype=torch.long, device=like.device) if step.padding is None else step.padding


def _append(buffer: torch.Tensor | None, new: torch.Tensor, start: int) -> torch.Tensor:
    end = start + new.shape[2]
    if buffer is None or buffer.shape[2] < end:
        buffer = _grown(buffer, new, -(-end // GROWTH) * GROWTH)
    buffer[:, :, start:end] = new
    return buffer


def _grown(buffer: torch.Tensor | None, like: torch.Tensor, room: int) -> torch.Tensor:
    larger = like.new_zeros(like.shape[0], like.shape[1], room, like.shape[3])
    if buffer is not None:
        larger[:, :, : buffer.shape[2]] = buffer
    return larger


def _hide(hidden: torch.Tensor) -> torch.Tensor:
    """bool, True = hidden → additive fp32 bias."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
