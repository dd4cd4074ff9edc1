"""`SegmentCache`: the transformers cache that executes a plan.

    with model.served():
        model.network.generate(ids, past_key_values=SegmentCache(model, plan))

Each layer (`segment_layer.py`) holds lanes (`lane.py`), and a lane segments (`segments.py`), over which attention is
merged. It knows plans, not methods.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from kvtool import conflicts
from kvtool.cache.build import lanes, onward, per_row, sparse
from kvtool.cache.keep.again import feed_again
from kvtool.cache.keep.looking import look_again
from kvtool.cache.keep.memo import Account
from kvtool.cache.keep.selection import select
from kvtool.cache.lane import Lane
from kvtool.cache.read.asking import recorded
from kvtool.cache.read.board import Board
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.serving import Session
from kvtool.slots import Select

Protocol = Literal["official", "strict"]


class SegmentCache(Session):
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
        self.geometry = model.geometry
        self.plan, self.network, self.prompt_length = plan, model.network, prompt_length
        self.told: torch.Tensor | None = None
        if prefix is not None:
            self._check(prefix)
        elif plan is not None:
            plan.check(model.fingerprint)
            self._check_plan(plan)
        self.onward = onward(model, plan, prompt_length)
        self.finished = prefix is not None or not self._waits
        self.board, self.fed_again = Board(), 0  # tokens that the network was fed again behind what was dropped
        board, length = self.board, prompt_length or 0
        finish, filled, done = (_weakly(call) for call in (self.finish, self._filled, self._done))
        layers: list[SegmentLayer] = [
            SegmentLayer(
                lambda number, index=index: lanes(model, plan, index, length, number, board),  # type: ignore[misc]
                strict=protocol == "strict",
                by_row=per_row(plan),
                finish=finish,
                filled=filled,
                done=done if index == model.geometry.layers - 1 else lambda: None,
                sparse=sparse(model, plan, index, prompt_length, board),
                onward=self.onward,
                index=index,
            )
            for index in range(model.geometry.layers)
        ]
        self.segments = layers
        super().__init__(layers=list(layers))
        if prefix is not None:
            for mine, theirs in zip(self.segments, prefix.segments, strict=True):
                mine.follow(theirs, board)

    def _check_plan(self, plan: Plan) -> None:
        """Raise InputError unless the plan can be executed under this protocol, with what is known of the prompt."""
        conflicts.check(plan)
        if plan.store is not None and plan.store.spans and self.protocol == "strict":
            raise InputError(
                "layers that are written as one wait for the last of them: no chunk can see its own entries coded",
                remedy="use the protocol official",
            )
        if plan.store is not None and plan.store.rest is not None and self._spec is None:
            raise InputError("dropped entries would be held in a lower encoding, but no selection drops any",
                             remedy="compose with a plan that selects")  # fmt: skip
        if plan.keep is not None and plan.keep.leaving and self.protocol == "strict":
            raise InputError(
                "tokens leave the forward once the prompt's last ones are there: no token can see what decode "
                "would", remedy="use the protocol official",
            )  # fmt: skip
        shared = plan.keep is not None and bool(plan.keep.recent_ratio) and not bool(plan.keep.full.all())
        spec = None if plan.keep is None else plan.keep.select
        parts = spec is not None and (bool((spec.budget <= 1).any()) or 0 < spec.recent < 1)
        early = spec is not None and spec.when == "chunk" and parts
        if early and self.prompt_length is None:
            raise InputError("this plan's budget is a share of a prompt that is not all in when entries go",
                             remedy="pass prompt_length=<tokens>")  # fmt: skip
        if shared and self.prompt_length is None:
            raise InputError("this plan's window is a share of the prompt", remedy="pass prompt_length=<tokens>")

    def _check(self, prefix: SegmentCache) -> None:
        """Raise InputError unless every row of this cache can go on from what `prefix` holds."""
        if prefix.network is not self.network:
            raise InputError("the shared prefix was computed by another model")
        if prefix.plan is not self.plan or prefix.protocol != self.protocol:
            raise InputError(
                "the shared prefix was made under another plan or protocol",
                remedy="pass the prefix's own: prefix.plan and protocol=prefix.protocol",
            )
        if self.plan is not None and self.plan.store is not None and self.plan.store.spans:
            raise InputError("a prefix cannot be shared when layers are written as one")
        if not prefix.single:
            raise InputError("a shared prefix is one sequence without padding, fed before it is shared")
        if not prefix.finished:
            raise InputError(
                "something happens under this plan once the prompt is in: entries are selected, say, or clustered",
                got="a prefix that is not finished",
                remedy="call prefix.finish(): that is then done to the prefix alone",
            )  # fmt: skip

    @property
    def at_once(self) -> bool:
        """Is a prompt to be fed at once, as the plan wants it? Under the protocol strict chunks are chunks."""
        return self.protocol == "official" and self.plan is not None and self.plan.at_once

    @property
    def single(self) -> bool:
        """Is one row held, without padding?"""
        return all(layer.single for layer in self.segments)

    def reset(self) -> None:
        self.finished, self.told, self.fed_again = not self._waits, None, 0
        super().reset()

    @property
    def _spec(self) -> Select | None:
        return None if self.plan is None or self.plan.keep is None else self.plan.keep.select

    @property
    def _waits(self) -> bool:
        """Does something happen once the prompt is in, or until then?"""
        store, read = (None, None) if self.plan is None else (self.plan.store, self.plan.read)
        fits = store is not None and store.fits
        reads = read is not None and read.waits
        return self._spec is not None or fits or reads or self.onward is not None

    def begin(self, tokens: int) -> None:
        if self.onward is not None:
            self.onward.begin(tokens, self.segments[0].columns, self.finished)

    def end(self) -> None:
        if self.onward is not None:
            self.onward.end()

    def finish(self) -> None:
        """The prompt is in: what a score selects is selected now, and the rest is freed; encodings are fitted, clusters
        made. The first decode step calls this too."""
        if self.finished:
            return
        self.finished = True
        if self._spec is not None:
            self.look_again()
            select(self._spec, self.segments)
            self._renew()
        for layer in self.segments:
            layer.settle()

    def _done(self) -> None:
        """The last layer's call is over."""
        self.board.clear()
        self._renew()

    def _renew(self) -> None:
        """Feed again what stands behind entries that were dropped, if the plan says so."""
        if self.plan is not None and self.plan.keep is not None and self.plan.keep.position == "reencode":
            self.fed_again += feed_again(self.network, self.segments)

    def tell(self, tokens: torch.Tensor) -> None:
        """What will follow the prompt, int64 [B,A], for plans that keep what it looks at; others do not care."""
        self.told = tokens.to(self.network.device)

    def look_again(self) -> None:
        """Let the selection's queries score the prompt that is in, if they come in a pass of their own."""
        if self._spec is not None:
            look_again(self._spec, self.network, self.segments, self.told, self.board.account)

    def _filled(self, layer: SegmentLayer) -> None:
        """The whole prompt is in one layer, the next ones to come: what its own scores select is selected now, so that
        no two layers ever hold all of a prompt."""
        if self.finished or layer.columns != self.prompt_length:
            return
        spec = self._spec
        if spec is None:
            layer.settle()
        elif spec.rule("spread").LEVEL != "model" and not spec.on_trial:  # which runs all layers again
            select(spec, [layer])

    def insert(self, entries: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Entries that are no tokens', k and v [B,K,n,D] for each layer: every query from now on sees all of them, in
        no order. Keys come rotated for whatever positions they are to have; tokens are counted without them, and no
        plan encodes, evicts or chooses among them (arXiv 2412.17747 adds trained ones)."""
        expected = (self.geometry.kv_heads, self.geometry.head_dim)
        if len(entries) != len(self.segments) or any((x.shape[1], x.shape[3]) != expected for e in entries for x in e):
            raise InputError(
                "inserted entries of another shape", got=[tuple(k.shape) for k, _ in entries][:2],
                expected=f"[B,{expected[0]},n,{expected[1]}] for each of {len(self.segments)} layers",
            )  # fmt: skip
        for layer, (k, v) in zip(self.segments, entries, strict=True):
            layer.insert(k, v)

    def record_for(self, *plans: Plan) -> None:
        """Keep the queries, and with any the tokens, that caches of these plans need to adopt this one."""
        each = [need for plan in plans for need in _records(plan)]
        for layer in self.segments:
            layer.record = -1 if -1 in each else max(each, default=0)

    def adopt(self, full: SegmentCache, account: Account | None = None) -> None:
        """Start from a prompt (unpadded) that the full cache `full` was fed at once.

        The result is the same as feeding this cache, as long as prefill is dense: under the official protocol, and a
        plan that says so. What is observed of the prompt is shared through `account` with other caches that adopt it:
        it has to be one of a memo for `full` as it is now, and for this plan.
        """
        if self.protocol != "official":
            raise InputError("a strict cache must see its own prefill")
        if self.onward is not None:
            raise InputError("a prompt whose tokens leave the forward must be fed to its own cache")
        assert account is None or full.single
        self.board.account = account
        for mine, theirs in zip(self.segments, full.segments, strict=True):
            mine.adopt(theirs)
        self.finish()
        self.board.account = None

    @property
    def nbytes(self) -> int:
        """Bytes held: the sum over every buffer of every lane, slack included, and what was inserted."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""
        for lane in self._all():
            yield from lane.buffers()
        for layer in self.segments:
            yield from layer.inserted

    @property
    def read_bytes(self) -> int:
        """Bytes of keys and values that one decode step reads."""
        return sum(lane.read_bytes() for lane in self._all()) + self._inserted

    @property
    def slow_bytes(self) -> int:
        """Of the bytes held, those in slower memory."""
        return sum(lane.slow_bytes() for lane in self._all())

    @property
    def _inserted(self) -> int:
        return sum(x.nbytes for layer in self.segments for x in layer.inserted)

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
        for layer in self.segments:
            yield from layer.lanes()
            if layer.contexts is not None:
                yield from layer.contexts.lanes()


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A method of a cache for its layers to call, which does not keep the cache alive: what nobody holds is freed at
    once, not when the garbage collector comes by. A layer does not outlive its cache."""
    found = weakref.WeakMethod(method)

    def call(*given: Any) -> None:
        live = found()
        if live is None:
            raise InputError("layers of a cache that is gone", remedy="keep the SegmentCache as long as its layers")
        live(*given)

    return call


def _records(plan: Plan) -> list[int]:
    """How many of a prompt's newest queries each of a plan's slots looks at; −1 all."""
    spec = plan.keep.select if plan.keep is not None else None
    tokens = plan.read is not None and plan.read.cut == "tokens"
    fitted = 0 if plan.store is None else plan.store.observed
    asked = 0 if plan.read is None else recorded(plan.read)
    return [int(tokens), asked, 0 if spec is None else _recorded(spec), fitted]


def _recorded(spec: Select) -> int:
    """How many of a prompt's newest queries a selection looks at; −1 all."""
    if spec.on_trial:  # only the tokens matter
        return 1
    few = spec.observe == "last" and spec.observed >= 1 and spec.rule("score").SEES != "own"
    return int(spec.observed) if few else -1
