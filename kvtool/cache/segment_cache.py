"""`SegmentCache`: the transformers cache that executes a plan.

    with model.served():
        model.network.generate(ids, past_key_values=SegmentCache(model, plan))

Each layer holds lanes (see `lane.py`); a query's attention is computed lane by lane, since heads are independent,
and segment by segment inside a lane, by merging. Rows of a batch with different left padding have lanes of their own,
so that what is held never contains padding. It knows plans, not methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from transformers.cache_utils import Cache

from kvtool import conflicts
from kvtool.cache.board import Board
from kvtool.cache.build import lanes, per_row
from kvtool.cache.lane import Lane, Step
from kvtool.cache.selection import select
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.serving import Attention, Layer
from kvtool_kernels.precision import wider

Protocol = Literal["official", "strict"]


class Part:
    """Rows of the batch that are fed alike: `rows` in the batch, left padding, and their lanes."""

    def __init__(self, rows: list[int], padding: int, lanes: list[Lane]):
        self.rows, self.padding, self.lanes, self.fed, self.origin = rows, padding, lanes, 0, 0

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step):
        """As `Lane.step`, for all heads of the layer."""
        self.fed += k.shape[2]
        if len(self.lanes) == 1:
            return self.lanes[0].step(q, k, v, step)
        return self._by_lane(q, lambda lane, part: lane.step(part, k[:, lane.heads], v[:, lane.heads], step))

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step):
        """As `Lane.trial`, for all heads of the layer."""
        if len(self.lanes) == 1:
            return self.lanes[0].trial(q, k, v, step)
        return self._by_lane(q, lambda lane, part: lane.trial(part, k[:, lane.heads], v[:, lane.heads], step))

    def absorb(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """As `Lane.absorb`, for all heads of the layer."""
        self.fed += k.shape[2]
        grouped = q.unflatten(1, (k.shape[1], -1))
        for lane in self.lanes:
            lane.absorb(k[:, lane.heads], v[:, lane.heads], step, grouped[:, lane.heads].flatten(1, 2))

    def _by_lane(self, q: torch.Tensor, work: Callable[[Lane, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]):
        batch, heads, tokens, width = q.shape
        kv_heads = sum(len(lane.heads) for lane in self.lanes)
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
        out = torch.empty_like(grouped)
        lse = q.new_empty(grouped.shape[:-1], dtype=wider(q.dtype))
        for lane in self.lanes:
            part, part_lse = work(lane, grouped[:, lane.heads].flatten(1, 2))
            shape = (batch, len(lane.heads), heads // kv_heads, tokens)
            out[:, lane.heads], lse[:, lane.heads] = part.reshape(*shape, width), part_lse.reshape(shape)
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
    ):
        super().__init__()
        self.make, self.strict, self.by_row, self.finish, self.filled = make, strict, by_row, finish, filled
        self.parts: list[Part] = []
        self.columns = 0
        self.prefix = 0  # columns that all rows share
        self.scale = 1.0
        self.softcap: float | None = None
        self.record = 0  # how many of the newest queries to keep for caches that adopt this one; −1 all
        self.queries: list[torch.Tensor] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        self.scale, self.softcap = call.scale, call.softcap
        if self.prefix:
            self._widen(len(q), call)
        elif sum(len(part.rows) for part in self.parts) < len(q):
            self._admit(len(q), self.columns + q.shape[2], call)
        if q.shape[2] == 1 and self.columns:
            self.finish()
        if self.record:
            self._remember(q)
        start, self.columns = self.columns, self.columns + k.shape[2]
        if len(self.parts) == 1 and self.parts[0].rows == list(range(len(q))) and not self.parts[0].padding:
            out, lse = self.parts[0].step(q, k, v, self._step(self.parts[0]))
        else:
            out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=wider(q.dtype))
            for part in self.parts:
                skip = max(0, part.padding - start)
                if skip < q.shape[2]:
                    at = (part.rows, slice(None), slice(skip, None))
                    out[at], lse[at] = part.step(q[at], k[at], v[at], self._step(part))
        if start == 0:
            self.filled(self)
        return _with_sink_logits(out, lse, call)

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        """As `Lane.trial`, for the one row that is held."""
        self.scale, self.softcap = call.scale, call.softcap
        out, lse = self.parts[0].trial(q, k, v, self._step(self.parts[0]))
        return _with_sink_logits(out, lse, call)

    def absorb(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """As `Lane.absorb`, for the one row that is held."""
        self.parts[0].absorb(q, k, v, self._step(self.parts[0]))
        self.columns += k.shape[2]

    @property
    def single(self) -> bool:
        """Is one row held, without padding?"""
        return len(self.parts) == 1 and self.parts[0].rows == [0] and not self.parts[0].padding

    def _step(self, part: Part) -> Step:
        return Step(part.fed, self.scale, self.softcap, self.strict, part.origin)

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
        for (pad, _), rows in groups.items():
            part = Part(rows, pad, self.make())
            part.origin = 0 if places is None else int(places[rows[0], max(0, pad - self.columns)])
            self.parts.append(part)

    def _widen(self, batch: int, call: Attention) -> None:
        """The first tokens after a shared prefix say how many rows go on from it."""
        if call.padding is not None and not bool(call.padding.all()):
            raise InputError("continuations of a shared prefix cannot be padded", remedy="feed equal lengths together")
        if self.columns == self.prefix and len(self.parts[0].rows) == 1:
            self._take(torch.zeros(batch, dtype=torch.long))

    def _remember(self, q: torch.Tensor) -> None:
        """Keep the newest queries; the last chunk may bring more than are asked for."""
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
        for part in self.parts:
            part.origin = other.parts[0].origin
            for lane in part.lanes:
                now = Step(first, 1.0, origin=part.origin)
                lane.absorb(k[part.rows][:, lane.heads], v[part.rows][:, lane.heads], now)
                selector = getattr(lane, "selector", None)
                if selector is not None:
                    q = torch.cat(other.queries, dim=2)[part.rows]
                    grouped = q.unflatten(1, (k.shape[1], -1))[:, lane.heads].flatten(1, 2)
                    selector.observe(grouped, other.columns - q.shape[2])
            part.fed = other.columns
        self.columns = other.columns

    def follow(self, other: SegmentLayer) -> None:
        """Go on from what `other` holds, one row without padding, and leave it alone."""
        (theirs,) = other.parts
        part = Part([0], 0, [lane.branch() for lane in theirs.lanes])
        part.fed, part.origin = theirs.fed, theirs.origin
        self.parts, self.columns, self.prefix = [part], other.columns, other.columns
        self.scale, self.softcap = other.scale, other.softcap

    def lanes(self) -> Iterator[Lane]:
        """All lanes of all parts."""
        return (lane for part in self.parts for lane in part.lanes)

    def reset(self) -> None:
        self.columns, self.prefix, self.parts, self.queries = 0, 0, [], []

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


class SegmentCache(Cache):
    """A fresh cache for one batch.

    plan None is the full cache. `protocol` says what prefill sees: all of its own chunk, compressed only afterwards
    ("official", as most methods are published: a prompt fed at once is seen whole), or at each token what decode would
    see there ("strict", in which chunked prefill, prefill at once and decode are all the same function, as long as no
    score selects entries). Decode is compressed either way. `prompt_length` (tokens) resolves windows that are a share
    of the prompt; raises InputError if a plan needs it and it is missing.

    `prefix` is another cache of the same plan, fed one sequence: every row of the batch goes on from there, and the
    prefix itself, which stays as it is, is held once for all. Windows are small and change: each row has its own.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan | None = None,
        *,
        protocol: Protocol = "official",
        prompt_length: int | None = None,
        prefix: SegmentCache | None = None,
    ):
        if protocol not in ("official", "strict"):
            raise InputError("unknown protocol", got=protocol, expected="official or strict")
        self.protocol: Protocol = protocol
        self.plan, self.network = plan, model.network
        if prefix is not None:
            self._check(prefix)
        elif plan is not None:
            plan.check(model.fingerprint)
            conflicts.check(plan)
            if plan.store is not None and plan.store.span > 1 and protocol == "strict":
                raise InputError(
                    "layers that are written as one wait for the last of them: no chunk can see its own entries coded",
                    remedy="use the protocol official",
                )
            shared = plan.keep is not None and bool(plan.keep.recent_ratio) and not bool(plan.keep.full.all())
            spec = None if plan.keep is None else plan.keep.select
            early = spec is not None and spec.when == "chunk" and bool((spec.budget <= 1).any())
            if early and prompt_length is None:
                raise InputError("this plan's budget is a share of a prompt that is not all in when entries go",
                                 remedy="pass prompt_length=<tokens>")  # fmt: skip
            if shared and prompt_length is None:
                raise InputError("this plan's window is a share of the prompt", remedy="pass prompt_length=<tokens>")
        self.finished = prefix is not None or plan is None or plan.keep is None or plan.keep.select is None
        board = Board()
        layers: list[SegmentLayer] = [
            SegmentLayer(
                lambda index=index: lanes(  # type: ignore[misc]
                    model, plan, index, prompt_length or 0, len(layers[index].parts), board
                ),
                strict=protocol == "strict",
                by_row=per_row(plan),
                finish=self.finish,
                filled=lambda layer: self._filled(layer, prompt_length),
            )
            for index in range(model.geometry.layers)
        ]
        self.segments = layers
        super().__init__(layers=list(layers))
        if prefix is not None:
            for mine, theirs in zip(self.segments, prefix.segments, strict=True):
                mine.follow(theirs)

    def _check(self, prefix: SegmentCache) -> None:
        """Raise InputError unless every row of this cache can go on from what `prefix` holds."""
        if prefix.network is not self.network:
            raise InputError("the shared prefix was computed by another model")
        if prefix.plan is not self.plan or prefix.protocol != self.protocol:
            raise InputError(
                "the shared prefix was made under another plan or protocol",
                remedy="pass the prefix's own: prefix.plan and protocol=prefix.protocol",
            )
        if self.plan is not None and self.plan.store is not None and self.plan.store.span > 1:
            raise InputError("a prefix cannot be shared when layers are written as one")
        if not prefix.single:
            raise InputError("a shared prefix is one sequence without padding, fed before it is shared")
        if not prefix.finished:
            raise InputError(
                "the plan selects entries by a score once the prompt is in", got="a prefix that is not finished",
                remedy="call prefix.finish(): the prefix alone is then what is selected from",
            )  # fmt: skip

    @property
    def single(self) -> bool:
        """Is one row held, without padding?"""
        return all(layer.single for layer in self.segments)

    def reset(self) -> None:
        self.finished = self.plan is None or self.plan.keep is None or self.plan.keep.select is None
        super().reset()

    def finish(self) -> None:
        """The prompt is in: what a score selects is selected now, and the rest is freed. The first decode step calls
        this too."""
        if self.finished:
            return
        self.finished = True
        assert self.plan is not None
        assert self.plan.keep is not None
        assert self.plan.keep.select is not None
        select(self.plan.keep.select, self.segments)

    def _filled(self, layer: SegmentLayer, prompt_length: int | None) -> None:
        """The whole prompt is in one layer, the next ones to come: what its own scores select is selected now, so that
        no two layers ever hold all of a prompt."""
        spec = None if self.plan is None or self.plan.keep is None else self.plan.keep.select
        if not self.finished and spec is not None and spec.spread != "model" and layer.columns == prompt_length:
            select(spec, [layer])

    def record_for(self, plan: Plan) -> None:
        """Keep the queries that a cache of `plan` needs to adopt this one."""
        spec = plan.keep.select if plan.keep is not None else None
        for layer in self.segments:
            layer.record = 0 if spec is None else spec.observed if spec.observe == "last" else -1

    def adopt(self, full: SegmentCache) -> None:
        """Start from a prompt (unpadded) that the full cache `full` was fed at once.

        The result is the same as feeding this cache, as long as prefill is dense: under the official protocol.
        """
        if self.protocol != "official":
            raise InputError("a strict cache must see its own prefill")
        for mine, theirs in zip(self.segments, full.segments, strict=True):
            mine.adopt(theirs)
        self.finish()

    @property
    def nbytes(self) -> int:
        """Bytes held: the sum over every buffer of every lane, slack included."""
        return sum(buffer.nbytes for lane in self._all() for buffer in lane.buffers())

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values that one decode step reads."""
        return sum(lane.read_bytes() for lane in self._all())

    @property
    def moved_bytes(self) -> int:
        """Bytes brought from slower memory so far."""
        return sum(lane.moved_bytes() for lane in self._all())

    def entries(self) -> torch.Tensor:
        """Entries held that a query may see, int64 [L,K]; of the batch's first row."""
        rows = []
        for layer in self.segments:
            row = {
                head: lane.entries() for lane in (layer.parts[0].lanes if layer.parts else []) for head in lane.heads
            }
            rows.append([row[head] for head in sorted(row)])
        return torch.tensor(rows)

    def _all(self) -> Iterator[Lane]:
        return (lane for layer in self.segments for lane in layer.lanes())


def _with_sink_logits(out: torch.Tensor, lse: torch.Tensor, call: Attention) -> torch.Tensor:
    """out [B,H,T,D] after the model's learned logits, whose value is 0, took part in the softmax."""
    if call.sink_logits is None:
        return out
    share = torch.sigmoid(lse - call.sink_logits.to(lse.dtype)[None, :, None])
    return (out * share[..., None]).to(out.dtype)
