"""One layer of a `SegmentCache`: what its queries see, and what is kept of its tokens.

    out = merge of what each part's lanes hold (`part.py`), what was inserted, and what other caches hold

Which row is in which part, `batched.py` says. It knows lanes, not plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kvtool.cache.batched import Batched
from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Lane, Partial, Step
from kvtool.cache.onward import Onward
from kvtool.cache.part import Part
from kvtool.cache.read.board import Board
from kvtool.cache.read.sparse import Sparse
from kvtool.dense import with_sink_logits
from kvtool.errors import InputError
from kvtool.serving import Attention
from kvtool_kernels.ops import attend, merge
from kvtool_kernels.precision import wider


class SegmentLayer(Batched):
    """One layer's lanes, fed part by part."""

    def __init__(
        self,
        make: Callable[[int], list[Lane]],
        *,
        strict: bool,
        by_row: bool,
        finish: Callable[[], None],
        filled: Callable[[SegmentLayer], None],
        done: Callable[[], None],
        sparse: Sparse | None = None,
        onward: Onward | None = None,
        index: int = 0,
    ):
        super().__init__(make, by_row=by_row, onward=onward)
        self.finish, self.filled = finish, filled
        self.protocol = strict  # what `strict` is at first, and again after `reset`
        self.strict, self.decoded = strict, False  # `decoded`: are all tokens from now on decode steps?
        self.done = done  # told of each call's end
        self.sparse = sparse  # chooses what a prompt's queries read
        self.index = index  # the layer's number
        self.scale = 1.0
        self.softcap: float | None = None
        self.given: Mapping[Any, Partial] = {}  # attention over shared entries, where this call brings it
        self.record = 0  # how many of the newest queries to keep for caches that adopt this one; −1 all
        self.queries: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []  # all that were fed, where queries are recorded

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        self.scale, self.softcap, self.given = call.scale, call.softcap, call.given
        going = None if self.onward is None else self.onward.going
        if going is not None and call.tokens is not None:
            call = replace(call, tokens=going.taken(call.tokens))
        self._enter(q, call)
        start, self.columns = self.columns, self.columns + (k.shape[2] if going is None else going.width)
        if len(self.parts) == 1 and self.parts[0].rows == list(range(len(q))) and not self.parts[0].padding:
            out, lse = self._fed(0, q, k, v, call.tokens)
        else:
            out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=wider(q.dtype))
            for number, part in enumerate(self.parts):
                skip = max(0, part.padding - start)
                if skip < q.shape[2]:
                    at = (part.rows, slice(None), slice(skip, None))
                    tokens = None if call.tokens is None else call.tokens[part.rows][:, skip:]
                    out[at], lse[at] = self._fed(number, q[at], k[at], v[at], tokens)
        if self.onward is not None:
            step = Step(0, self.scale, self.softcap, tokens=call.tokens)
            self.onward.choose(self.index, self.parts, q, k, v, step)
        if start == 0:
            self.filled(self)
        self.done()
        return with_sink_logits(*self._beside(q, (out, lse), self.inserted, start), call)

    def _enter(self, q: torch.Tensor, call: Attention) -> None:
        """Queries q [B,H,T,D] come: rows have parts, the prompt is over if this is a decode step."""
        if self.contexts is not None and call.padding is not None and not bool(call.padding.all()):
            raise InputError("what follows documents cannot be padded", remedy="feed equal lengths together")
        if self.prefix:
            self._widen(len(q), call)
        elif sum(len(part.rows) for part in self.parts) < len(q):
            self._admit(len(q), self.columns + q.shape[2], call)
        if q.shape[2] == 1 and self.columns:
            self.finish()
        if self.record:
            self._remember(q, call.tokens)

    def _fed(
        self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor | None
    ) -> Partial:
        """As `Part.step`, of one of the parts."""
        part = self.parts[number]
        step = self._step(part, tokens, self.given)
        if self.onward is not None and self.onward.going is not None:
            step = replace(step, places=self.onward.going.places(part.rows[0], part.padding))
        if self.sparse is not None:
            step = replace(step, chosen=self.sparse.choose((number, part.padding), part.lanes, q, k, step))
        return part.step(q, k, v, step)

    def trial(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention, number: int = 0
    ) -> torch.Tensor:
        """As `Lane.trial`, for the rows of one part of the batch."""
        self.scale, self.softcap = call.scale, call.softcap
        part = self.parts[number]
        out = part.trial(q, k, v, self._step(part))
        self.done()
        start = part.fed + k.shape[2] - q.shape[2]
        return with_sink_logits(*self._beside(q, out, [x[part.rows] for x in self.inserted], start), call)

    def renew(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention, number: int) -> torch.Tensor:
        """As `Lane.renew`, for the rows of one part of the batch."""
        part = self.parts[number]
        start = part.fed - q.shape[2]
        out = part.renew(q, k, v, replace(self._step(part), start=start))
        return with_sink_logits(*self._beside(q, out, [x[part.rows] for x in self.inserted], start), call)

    def insert(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Entries k, v [B,K,n,D] of no token: every query from now on sees all of them."""
        held = self.inserted or [k[:, :, :0], v[:, :, :0]]
        self.inserted = [torch.cat(pair, dim=2) for pair in zip(held, (k, v), strict=True)]

    def _beside(self, q: torch.Tensor, out: Partial, inserted: list[torch.Tensor], start: int) -> Partial:
        """`out`, merged with attention over inserted entries and over what other caches hold; `start` tokens were fed
        before the first query."""
        if self.contexts is not None:
            out = self.contexts.beside(q, out, start, self.scale, self.softcap)
        return merge(out, attend(q, *inserted, scale=self.scale, softcap=self.softcap)) if inserted else out

    def absorb(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor | None = None) -> None:
        """As `Lane.absorb`, for the one row that is held; tokens int64 [1,T]."""
        self.parts[0].absorb(q, k, v, self._step(self.parts[0], tokens))
        self.columns += k.shape[2]
        self.done()

    def fill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> None:
        """As `attend`, of one row's first tokens, but attending to nothing: a cache of the full plan holds the same."""
        self.scale, self.softcap = call.scale, call.softcap
        self._admit(len(k), k.shape[2])
        if self.record:
            self._remember(q, call.tokens)
        self.absorb(q, k, v, call.tokens)

    def settle(self) -> None:
        """The prompt is in: lanes that still wait for its end go on."""
        for lane in self.lanes():
            if isinstance(lane, Bulk):
                lane.settle(self.strict)

    def _step(self, part: Part, tokens: torch.Tensor | None = None, given: Mapping[Any, Partial] | None = None) -> Step:
        return Step(
            part.fed, self.scale, self.softcap, self.strict, self.decoded, part.origin, tokens, given=given or {}
        )

    def _remember(self, q: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Keep the newest queries, and all tokens; the last chunk may bring more than are asked for."""
        if tokens is not None:
            self.tokens.append(tokens)
        self.queries.append((q if self.record < 0 else q[:, :, -self.record :]).clone())  # a view would keep all of q
        while self.record > 0 and sum(x.shape[2] for x in self.queries[1:]) >= self.record:
            self.queries.pop(0)

    def adopt(self, other: SegmentLayer) -> None:
        """Take over what `other`, one lane of all heads without padding, holds, as if it had been fed here."""
        (theirs,) = other.parts[0].lanes
        k, v, first = theirs.recall()
        self._admit(len(k), other.columns)
        self.scale, self.softcap = other.scale, other.softcap
        tokens = torch.cat(other.tokens, dim=1) if other.tokens else None
        for part in self.parts:
            part.origin = other.parts[0].origin
            own = None if tokens is None else tokens[part.rows]
            now = Step(first, self.scale, self.softcap, origin=part.origin, tokens=own)
            for lane in part.lanes:
                q = torch.cat(other.queries, dim=2)[part.rows] if other.queries else None
                q = None if q is None else q.unflatten(1, (k.shape[1], -1))[:, lane.heads].flatten(1, 2)
                lane.absorb(k[part.rows][:, lane.heads], v[part.rows][:, lane.heads], now, q)
                if isinstance(lane, Bulk) and q is not None:
                    lane.look(q, now)
            part.fed = other.columns
        self.columns = other.columns

    def follow(self, other: SegmentLayer, board: Board) -> None:
        """Go on from what `other` holds, one row without padding, and leave it alone; layers meet at this board."""
        (theirs,) = other.parts
        part = Part([0], 0, [lane.branch() for lane in theirs.lanes])
        for lane in part.lanes:
            lane.meet(board)
        part.fed, part.origin = theirs.fed, theirs.origin
        self.parts, self.columns, self.prefix = [part], other.columns, other.columns
        self.inserted = list(other.inserted)
        self.contexts = None if other.contexts is None else other.contexts.aside()
        self.scale, self.softcap = other.scale, other.softcap

    def reset(self) -> None:
        self.columns, self.prefix, self.parts, self.queries, self.tokens, self.inserted = 0, 0, [], [], [], []
        self.contexts, self.strict, self.decoded = None, self.protocol, False
