"""One layer of a `SegmentCache`: its lanes, for each part of the batch.

A query's attention is computed lane by lane, since heads are independent. Rows with different left padding are parts
of their own, so that what is held never contains padding. It knows lanes, not plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Lane, Partial, Step
from kvtool.cache.onward import Onward
from kvtool.cache.read.board import Board
from kvtool.cache.read.sparse import Sparse
from kvtool.cache.share.contexts import Contexts
from kvtool.errors import InputError
from kvtool.serving import Attention, Layer
from kvtool_kernels.ops import attend, attend_ragged, merge
from kvtool_kernels.precision import wider


class Part:
    """Rows of the batch that are fed alike: `rows` in the batch, left padding, and their lanes."""

    def __init__(self, rows: list[int], padding: int, lanes: list[Lane]):
        self.rows, self.padding, self.lanes, self.fed, self.origin = rows, padding, lanes, 0, 0

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step):
        """As `Lane.step`, for all heads of the layer."""
        self.fed = step.end(k.shape[2])
        if len(self.lanes) == 1:
            return self.lanes[0].step(q, k, v, step)
        if q.shape[2] == 1 and all(lane.plain(step) for lane in self.lanes):
            return self._at_once(q, k, v, step)
        return self._by_lane(q, lambda lane, part: lane.step(part, k[:, lane.at], v[:, lane.at], step))

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step):
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

    def _by_lane(self, q: torch.Tensor, work: Callable[[Lane, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]):
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


class SegmentLayer(Layer):
    """One layer's lanes, part by part. `columns` counts tokens fed, padding included."""

    def __init__(
        self,
        make: Callable[[], list[Lane]],
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
        super().__init__()
        self.make, self.by_row, self.finish, self.filled = make, by_row, finish, filled
        self.protocol = strict  # what `strict` is at first, and again after `reset`
        self.strict, self.decoded = strict, False  # `decoded`: are all tokens from now on decode steps?
        self.done = done  # told of each call's end
        self.sparse = sparse  # chooses what a prompt's queries read
        self.onward, self.index = onward, index  # which of a prompt's tokens reach this layer, whose number is `index`
        self.parts: list[Part] = []
        self.columns = 0
        self.prefix = 0  # columns that all rows share
        self.inserted: list[torch.Tensor] = []  # k, v [B,K,n,D] of no token
        self.contexts: Contexts | None = None  # what other caches hold, before all that is fed
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
        return _with_sink_logits(*self._beside(q, (out, lse), self.inserted, start), call)

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
        return _with_sink_logits(*self._beside(q, out, [x[part.rows] for x in self.inserted], start), call)

    def renew(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention, number: int) -> torch.Tensor:
        """As `Lane.renew`, for the rows of one part of the batch."""
        part = self.parts[number]
        start = part.fed - q.shape[2]
        out = part.renew(q, k, v, replace(self._step(part), start=start))
        return _with_sink_logits(*self._beside(q, out, [x[part.rows] for x in self.inserted], start), call)

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
                lane.settle()

    @property
    def single(self) -> bool:
        """Is one row held, without padding?"""
        return len(self.parts) == 1 and self.parts[0].rows == [0] and not self.parts[0].padding

    @property
    def place(self) -> int:
        """The position of the token that comes next."""
        if self.parts:
            return self.parts[0].origin + self.columns
        return 0 if self.contexts is None else self.contexts.start

    def _step(self, part: Part, tokens: torch.Tensor | None = None, given: Mapping[Any, Partial] | None = None) -> Step:
        return Step(
            part.fed, self.scale, self.softcap, self.strict, self.decoded, part.origin, tokens, given=given or {}
        )

    def _admit(self, batch: int, end: int, call: Attention | None = None) -> None:
        """Give rows whose first token has come a part: rows with equal padding share one, unless `by_row`."""
        waiting = [row for row in range(batch) if all(row not in part.rows for part in self.parts)]
        padding, places = [0] * batch, None
        if call is not None and call.padding is not None:
            seen = call.padding.bool()
            if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
                raise InputError("the attention mask hides tokens elsewhere than on the left", remedy="pad on the left")
            padding = (~seen).sum(1).tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for row in waiting:
            if padding[row] < end:
                groups.setdefault((padding[row], row if self.by_row else 0), []).append(row)
        if call is not None and call.positions is not None:
            places = call.positions.expand(batch, -1)
        first = 0 if self.contexts is None else self.contexts.start
        for (pad, _), rows in groups.items():
            part = Part(rows, pad, self.make())
            part.origin = first if places is None else int(places[rows[0], max(0, pad - self.columns)])
            if places is not None and self.onward is not None and self.onward.going is not None:
                part.origin -= int(self.onward.going.places(rows[0], pad)[0])
            if self.contexts is not None and part.origin != self.contexts.start:
                raise InputError(
                    "what follows a prefix or documents does not stand behind them", got=f"position {part.origin}",
                    expected=self.contexts.start, remedy="pass position_ids",
                )  # fmt: skip
            self.parts.append(part)

    def _widen(self, batch: int, call: Attention) -> None:
        """The first tokens after a shared prefix say how many rows go on from it."""
        if call.padding is not None and not bool(call.padding.all()):
            raise InputError("continuations of a shared prefix cannot be padded", remedy="feed equal lengths together")
        if self.columns == self.prefix and len(self.parts[0].rows) == 1:
            self._take(torch.zeros(batch, dtype=torch.long))

    def _remember(self, q: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Keep the newest queries, and all tokens; the last chunk may bring more than are asked for."""
        if tokens is not None:
            self.tokens.append(tokens)
        self.queries.append((q if self.record < 0 else q[:, :, -self.record :]).clone())  # a view would keep all of q
        while self.record > 0 and sum(x.shape[2] for x in self.queries[1:]) >= self.record:
            self.queries.pop(0)

    def get_seq_length(self) -> int:
        return self.columns

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
            if isinstance(lane, Bulk):
                lane.meet(board)
        part.fed, part.origin = theirs.fed, theirs.origin
        self.parts, self.columns, self.prefix = [part], other.columns, other.columns
        self.inserted = list(other.inserted)
        self.contexts = None if other.contexts is None else other.contexts.aside()
        self.scale, self.softcap = other.scale, other.softcap

    def lanes(self) -> Iterator[Lane]:
        """All lanes of all parts."""
        return (lane for part in self.parts for lane in part.lanes)

    def reset(self) -> None:
        self.columns, self.prefix, self.parts, self.queries, self.tokens, self.inserted = 0, 0, [], [], [], []
        self.contexts, self.strict, self.decoded = None, self.protocol, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(beam_idx)

    def _take(self, indices: torch.Tensor) -> None:
        """Rows of the batch become these rows of it; a row stays with the part it came from."""
        sources = indices.tolist()
        for part in self.parts:
            rows = [at for at, source in enumerate(sources) if source in part.rows]
            local = torch.tensor([part.rows.index(sources[at]) for at in rows], dtype=torch.long)
            for lane in part.lanes:
                lane.reorder(local)
            part.rows = rows
        self.parts = [part for part in self.parts if part.rows]
        self.inserted = [x[indices] for x in self.inserted]
        if self.by_row and not self.prefix and any(len(part.rows) > 1 for part in self.parts):
            raise InputError(
                "rows of this plan's cache hold different entries and cannot be repeated",
                remedy="use one beam, or a plan whose budget does not depend on the prompt",
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Overwritten entries cannot come back."""
        raise InputError(
            "a segment cache cannot be rolled back", remedy="assisted generation and prompt lookup need the full cache"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(sum(len(part.rows) for part in self.parts)).repeat_interleave(repeats))


def _with_sink_logits(out: torch.Tensor, lse: torch.Tensor, call: Attention) -> torch.Tensor:
    """out [B,H,T,D] after the model's learned logits, whose value is 0, took part in the softmax."""
    if call.sink_logits is None:
        return out
    share = torch.sigmoid(lse - call.sink_logits.to(lse.dtype)[None, :, None])
    return (out * share[..., None]).to(out.dtype)
