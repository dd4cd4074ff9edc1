"""A part of a batch in one layer: rows with the same left padding, so that what is held never contains any.

Attention is computed lane by lane, since heads are independent, and put together for all heads of the layer. Lanes that
are plain at a decode step (see `Lane.plain`) are attended in one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvtool.cache.lane import Lane, Partial, Step
from kvtool_kernels.ops import attend_ragged
from kvtool_kernels.precision import wider


class Part:
    """Rows of the batch that are fed alike: `rows` in the batch, left padding, and their lanes."""

    def __init__(self, rows: list[int], padding: int, lanes: list[Lane]):
        self.rows, self.padding, self.lanes, self.fed, self.origin = rows, padding, lanes, 0, 0

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """As `Lane.step`, for all heads of the layer."""
        self.fed = step.end(k.shape[2])
        if len(self.lanes) == 1:
            return self.lanes[0].step(q, k, v, step)
        if q.shape[2] == 1 and all(lane.plain(step) for lane in self.lanes):
            return self._at_once(q, k, v, step)
        return self._by_lane(q, lambda lane, part: lane.step(part, k[:, lane.at], v[:, lane.at], step))

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """As `Lane.trial`, for all heads of the layer."""
        if len(self.lanes) == 1:
            return self.lanes[0].trial(q, k, v, step)
        return self._by_lane(q, lambda lane, part: lane.trial(part, k[:, lane.at], v[:, lane.at], step))

    def renew(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """As `Lane.renew`, for all heads of the layer."""
        if len(self.lanes) == 1:
            return self.lanes[0].renew(q, k, v, step)
        return self._by_lane(q, lambda lane, part: lane.renew(part, k[:, lane.at], v[:, lane.at], step))

    def over(self, q: torch.Tensor, places: torch.Tensor, step: Step) -> Partial:
        """As `Lane.over`, for all heads of the layer."""
        if len(self.lanes) == 1:
            return self.lanes[0].over(q, places, step)
        return self._by_lane(q, lambda lane, part: lane.over(part, places, step))

    def absorb(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """As `Lane.absorb`, for all heads of the layer."""
        self.fed += k.shape[2]
        grouped = q.unflatten(1, (k.shape[1], -1))
        for lane in self.lanes:
            lane.absorb(k[:, lane.at], v[:, lane.at], step, grouped[:, lane.at].flatten(1, 2))

    def _at_once(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        """A decode step in which all lanes are attended together, as ragged heads: one call, work in equal shares."""
        grouped = q.unflatten(1, (k.shape[1], -1))
        pairs = [lane.enter(k[:, lane.at], v[:, lane.at], step) for lane in self.lanes]
        order = [head for lane in self.lanes for head in lane.heads]
        moved = order != sorted(order)
        rows = grouped[:, order].flatten(1, 2) if moved else q
        out, lse = attend_ragged(rows, [k for k, _ in pairs], [v for _, v in pairs], **step.options)
        for lane in self.lanes:
            lane.leave(grouped[:, lane.at].flatten(1, 2), step)
        if not moved:
            return out, lse
        back = sorted(range(len(order)), key=order.__getitem__)
        shape = (len(order), -1)
        return out.unflatten(1, shape)[:, back].flatten(1, 2), lse.unflatten(1, shape)[:, back].flatten(1, 2)

    def _by_lane(self, q: torch.Tensor, work: Callable[[Lane, torch.Tensor], Partial]) -> Partial:
        batch, heads, tokens, width = q.shape
        kv_heads = sum(len(lane.heads) for lane in self.lanes)
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
        out = torch.empty_like(grouped)
        lse = q.new_empty(grouped.shape[:-1], dtype=wider(q.dtype))
        for lane in self.lanes:
            part, part_lse = work(lane, grouped[:, lane.at].flatten(1, 2))
            shape = (batch, len(lane.heads), heads // kv_heads, tokens)
            out[:, lane.at], lse[:, lane.at] = part.reshape(*shape, width), part_lse.reshape(shape)
        return out.flatten(1, 2), lse.flatten(1, 2)
