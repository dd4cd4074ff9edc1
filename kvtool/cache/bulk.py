"""Entries in order: raw sinks, a bulk that may be coded, and raw recent entries.

    [ sinks: the first S | bulk: whole blocks, in the order they came | recent: R … R + block − 1 newest ]

A block leaves `recent` for the bulk when R + block entries stand there, is encoded once, and is never touched again.
After t tokens the bulk therefore holds block · ⌊(t − S − R) / block⌋ of them, whatever the prompt's cut, unless a
selection thinned the prompt first. A query never sees the effect of its own token: entries move after the attention.

Without a store all entries are `recent`. What a selection drops may be held on in a lower encoding (`rest.py`), and the
bulk may be a chain of encodings by age (`tiers.py`). An encoding that fits itself to the prompt waits for its end. A
branch has the shared entries of what it branched from before all others. Shapes as in `lane.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from kvtool.cache.coded import Coded
from kvtool.cache.lane import Lane, Partial, Step
from kvtool.cache.pool import Member
from kvtool.cache.reader import Reader
from kvtool.cache.rest import Rest
from kvtool.cache.scores._base import View
from kvtool.cache.segments import Dense, Segment
from kvtool.cache.selector import Selector
from kvtool.cache.shared import Shared
from kvtool.cache.tiers import Tiers
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.rotary import Rotary
from kvtool_kernels.ops import attend, merge


class Bulk(Lane):
    """`block` None: nothing leaves `recent`. `key`, `value` None: the bulk is held raw, for `reader` to choose from.

    older, limits: the encodings that follow with age, and how many entries each one before them holds.
    reindex: what a selection keeps is moved up to the next token, so that positions are counted inside the cache.
    """

    def __init__(
        self,
        heads: list[int],
        *,
        sink: int = 0,
        recent: int = 0,
        block: int | None = None,
        key: Encoding | None = None,
        value: Encoding | None = None,
        older: Sequence[tuple[Encoding, Encoding]] = (),
        limits: Sequence[int] = (),
        rest: Rest | None = None,
        rotary: Rotary | None = None,
        selector: Selector | None = None,
        reader: Reader | None = None,
        member: Member | None = None,
        reindex: bool = False,
    ):
        super().__init__(heads)
        self.limits, self.block = (sink, recent), block
        self.encodings, self.rotary, self.reindex = (key, value), rotary, reindex
        self.older, self.held, self.rest = older, limits, rest
        self.selector, self.reader, self.member = selector, reader, member
        self.sinks, self.recent = Dense(), Dense()
        self.queries: list[torch.Tensor] = []  # those that an encoding fits itself to, until the prompt's end
        coded = [encoding for encoding in (key, value, *(rest.encodings if rest else ())) if encoding is not None]
        self.fits = any(encoding.fits for encoding in coded)
        self.watched = [encoding.observed for encoding in coded]
        self.bulk: Segment = self._fresh()
        self.shared: list[Shared] = []
        self.positions: torch.Tensor | None = None  # int64 [B,K,N] of all entries not shared, where they are needed
        self.tokens: torch.Tensor | None = None  # int64 [B,K,N], where the selector looks at them
        self.fed = self.origin = 0
        self.finished = self.selector is None and not self.fits
        if rest is not None:
            rest.coded.queries = self._seen

    def _fresh(self) -> Segment:
        if self.member is not None:
            self.member.pool.coded.positions = self._bulk_positions
            return self.member
        key, value = self.encodings
        slow = self.reader is not None and self.reader.slow
        if key is None or value is None:
            return Dense(slow=slow)
        made = Coded(key, value, self.rotary, slow=slow)
        made.positions, made.queries = self._bulk_positions, self._seen
        if not self.older:
            return made
        assert self.block is not None
        tiers = [made, *(Coded(*pair, self.rotary) for pair in self.older)]
        return Tiers(tiers, list(self.held), self.block, self._bulk_positions)

    def _seen(self) -> torch.Tensor | None:
        """The observed queries of each KV head's group, [1,K,N,D]."""
        if not self.queries:
            return None
        q = torch.cat(self.queries, dim=2)
        q = q if -1 in self.watched else q[:, :, -max(self.watched) :]
        return q.unflatten(1, (len(self.heads), -1)).flatten(2, 3)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        pieces = self._pieces(k.shape[2]) if step.strict else [k.shape[2]]
        if len(pieces) == 1:
            return self._one(q, k, v, step)
        cut = zip(q.split(pieces, 2), k.split(pieces, 2), v.split(pieces, 2), step.split(pieces), strict=True)
        outs = [self._one(*parts) for parts in cut]
        return torch.cat([out for out, _ in outs], dim=2), torch.cat([lse for _, lse in outs], dim=2)

    def _pieces(self, tokens: int) -> list[int]:
        """The tokens of a chunk, cut where a block moves; one by one if each chooses what it reads, or evicts."""
        if self.finished and self.selector is not None and self.selector.spec.when == "step":
            return [1] * tokens
        if self.block is None or not self.finished:
            return [tokens]
        if self.reader is not None:
            return [1] * tokens
        room = self._lacking() + self.limits[1] + self.block - self.recent.length
        first = min(tokens, room)
        rest = tokens - first
        return [first, *[self.block] * (rest // self.block), *[rest % self.block] * (rest % self.block > 0)]

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        self._receive(k, v, step, q)
        out = self._attend(q, step, causal=q.shape[2] > 1)
        self._observe(q, step)
        self._move()
        return out

    def _observe(self, q: torch.Tensor, step: Step) -> None:
        """The queries of the newest entries are there: the selector remembers them, and evicts if it does so now."""
        if self._settled() or not q.shape[2]:
            return
        self.look(q, step)
        if self.selector is not None and (self.finished or self.selector.spec.when == "chunk"):
            self.evict(step)

    def _settled(self) -> bool:
        """Will no more queries be looked at?"""
        return self.finished and (self.selector is None or self.selector.spec.when != "step")

    def _receive(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        most = self.selector.most(self.fed) if self.finished and self.selector is not None else None
        self.recent.append(k, v, most)
        if self.reader is not None:
            self.reader.receive(q, k, step)
        self.origin = step.origin
        if self.positions is not None:
            new = torch.arange(self.fed, self.fed + k.shape[2], device=k.device)
            self.positions = torch.cat([self.positions, new.expand(*self.positions.shape[:2], -1)], dim=2)
        if self.selector is not None and "tokens" in self.selector.needs and not self._settled():
            if step.tokens is None:
                raise InputError("the plan looks at tokens", got="input embeddings", remedy="pass input_ids")
            tokens = step.tokens.to(k.device)[:, None].expand(-1, len(self.heads), -1)
            self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=2)
        self.fed += k.shape[2]

    def _attend(self, q: torch.Tensor, step: Step, *, causal: bool) -> Partial:
        if self.finished and q.shape[2] == 1 and self.selector is not None and self.selector.asks:
            out, self.selector.logits = self.recent.scored(q, step)
        else:
            out = self.recent.attend(q, step, causal=causal)
        return self._attend_before(q, step, out)

    def _attend_before(self, q: torch.Tensor, step: Step, out: Partial) -> Partial:
        """`out`, merged with attention over everything that is not recent."""
        if self.bulk.length:
            if self.reader is not None and q.shape[2] == 1:
                out = merge(self.reader.attend(q, self.bulk, step), out)
            else:
                out = merge(self.bulk.attend(q, step), out)
        if self.sinks.length:
            out = merge(self.sinks.attend(q, step), out)
        for segment in self.shared:
            out = merge(segment.attend(q, step), out)
        if self.rest is not None and self.rest.length:
            out = merge(self.rest.attend(q, step), out)
        return out

    def trial(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        out = attend(q, k, v, causal=True, **step.options)
        if self.recent.length:
            out = merge(self.recent.attend(q, step), out)
        return self._attend_before(q, step, out)

    def absorb(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        alone = self.finished and (
            self.selector is not None or (self.reader is not None and self.reader.cuts is not None)
        )
        if q is None or not alone:
            self._receive(k, v, step)
        else:
            each = step.split([1] * k.shape[2])
            for row, key, value, now in zip(q.split(1, 2), k.split(1, 2), v.split(1, 2), each, strict=True):
                self._receive(key, value, now, row)
                self._observe(row, now)
        self._move()

    def branch(self) -> Bulk:
        """Full sinks and the bulk are shared, and recent entries too where no block leaves them."""
        stepping = self.selector is not None and self.selector.spec.when == "step"
        if self.older or self.rest is not None:
            raise InputError(
                "entries that are encoded again with age, or once they are dropped, cannot be shared",
                remedy="feed the prefix to every row, or share it under a plan without that",
            )
        if self.reader is not None or stepping:
            raise InputError(
                "entries that later tokens choose from, or evict, cannot be shared",
                got="a plan that " + ("reads selectively" if self.reader is not None else "evicts at every step"),
                remedy="feed the prefix to every row, or share it under a plan without that",
            )
        assert self.finished
        if self._unfitted():
            raise InputError(
                "the prefix leaves nothing to fit an encoding to", got=f"{self.fed} tokens", remedy="share a longer one"
            )
        made = copy.copy(self)
        made.selector, made.fits = None, False
        if isinstance(self.bulk, Coded):
            made.encodings = (self.bulk.key, self.bulk.value)
        made.bulk, made.shared = made._fresh(), list(self.shared)
        parts = [self.recent] if self.block is None else [self.sinks, self.bulk] if self._lacking() == 0 else []
        first = 0
        for part in parts:
            if part.length:
                places = None if self.positions is None else self.positions[:, :, first : first + part.length]
                places = None if places is None else places + self.origin
                made.shared.append(Shared(part, len(self.heads), self._ahead() + first + self.origin, places))
            first += part.length
        if self.positions is not None:
            made.positions = self.positions[:, :, first:].clone()
        for name in ("sinks", "recent"):
            held, own = getattr(self, name), Dense()
            if held not in parts and held.length:
                own.append(*held.recall())
            setattr(made, name, own)
        return made

    def _move(self) -> None:
        """Sinks first, then whole blocks into the bulk."""
        if self.block is None or not self.finished:
            return
        spare = self.recent.length - self.limits[1]
        missing = min(self._lacking(), spare)
        if missing > 0:
            self.sinks.append(*self.recent.pop(missing))
            spare -= missing
            if self.reader is not None:
                self.reader.skip(missing)
        count = spare // self.block * self.block
        if count > 0:
            k, v = self.recent.pop(count)
            if self.reader is not None:
                self.reader.append(k, v)
            self.bulk.append(k, v)

    def _lacking(self) -> int:
        """Sinks that are still to come."""
        return max(0, self.limits[0] - self._ahead() - self.sinks.length)

    def _ahead(self) -> int:
        """Shared entries."""
        return sum(segment.length for segment in self.shared)

    def finish(self) -> None:
        self.finished = True
        if self.selector is not None:
            self.selector.finish()
            self.tokens = self.tokens if self.selector.spec.when == "step" else None
        self._move()
        self.queries = self.queries if self._unfitted() else []

    def _unfitted(self) -> bool:
        """Is there still an encoding that is to be fitted, to the first entries that it is given?"""
        held = [self.bulk.length] if self.fits else []
        held += [self.rest.coded.length] if self.rest is not None and any(e.fits for e in self.rest.encodings) else []
        return 0 in held

    def look(self, q: torch.Tensor, step: Step) -> None:
        """Let the selector, and encodings that fit themselves, see q [B,H,T,D], the queries of the newest entries,
        which must all be recent."""
        if any(self.watched) and not self.finished:
            self.queries.append(q.clone() if -1 in self.watched else q[:, :, -max(self.watched) :].clone())
        if self.selector is not None:
            self.selector.observe(q, self.fed - q.shape[2], *self.recent.recall(), step, self._tags())

    def view(self, step: Step) -> View:
        """The entries held, which must all be recent, and the queries that were observed."""
        assert self.selector is not None
        return self.selector.view(*self.recent.recall(), step, self._tags())

    def _tags(self) -> dict[str, torch.Tensor]:
        """What the selector's rules need to know of the entries held, which must all be recent, int64 [B,K,S]."""
        assert self.selector is not None
        tags: dict[str, torch.Tensor] = {}
        if "positions" in self.selector.needs:
            places = self.positions
            if places is None:
                k = self.recent.keys()
                places = torch.arange(self.fed - k.shape[2], self.fed, device=k.device).expand(*k.shape[:2], -1)
            tags["positions"] = places + self.origin
        if self.tokens is not None:
            tags["tokens"] = self.tokens
        return tags

    def evict(self, step: Step) -> None:
        """Keep what the selector's limit allows; with nothing to drop or to remember, nothing is scored."""
        assert self.selector is not None
        if self.selector.queries:
            held = self.recent.length
            count = self.selector.due(held, self.fed)
            if count == held and not self.selector.remembers and not self.selector.picking.RAGGED:
                self.selector.settle(None, self.selector.limit or count)
                return
            view = self.view(step)
            scores = self.selector.scores(view)
            self.thin(view, scores, count, scores)

    def thin(self, view: View, scores: torch.Tensor, count: int, peers: torch.Tensor) -> None:
        """Of the entries in view, which are all that are held, keep `count` by scores [B,K,S], if there are more; peers
        as in `Choice`."""
        assert self.selector is not None
        spec, held = self.selector.spec, self.recent.length
        limit = self.selector.limit or count
        if held > count or self.selector.picking.RAGGED:
            index = self.selector.choose(view, scores, count, peers)
            if index.shape[2] < held:
                if self.rest is not None:
                    self._demote(index, held)
                merged = self.selector.merging.merge(self.selector.job(view, scores, self.recent.counts(), index))
                if isinstance(merged, tuple):
                    self.recent.become(*merged, count=spec.count)
                else:
                    self.recent.take(index)
                    if merged is not None:
                        self.recent.put(merged.places, merged.k, merged.v, merged.counts if spec.count else None)
                scores = scores.gather(2, index)
                self._place(index, held)
        self.selector.settle(scores, limit)

    def _demote(self, index: torch.Tensor, held: int) -> None:
        """Hand on all entries but index int64 [B,K,N] of those held."""
        assert self.rest is not None
        stays = torch.zeros(*index.shape[:2], held, dtype=torch.bool, device=index.device).scatter(2, index, True)
        goes = (~stays).nonzero()[:, 2].reshape(*index.shape[:2], -1)
        k, v = (x.gather(2, goes[..., None].expand(-1, -1, -1, x.shape[-1])) for x in self.recent.recall())
        first = self.fed - held + self.origin
        self.rest.add(k, v, goes + first if self.positions is None else self.positions.gather(2, goes) + self.origin)

    def _place(self, index: torch.Tensor, held: int) -> None:
        """Entries index int64 [B,K,N] of those held have stayed: note their positions where keys need them, or move
        their keys so that they stand right before the next token; all held stood so before."""
        key, selector = self.encodings[0], self.selector
        if self.tokens is not None:
            self.tokens = self.tokens.gather(2, index)
        if self.reader is not None:
            self.reader.take(index)
        wanted = selector is not None and selector.spec.when != "prefill" and "positions" in selector.needs
        wanted |= key is not None and not key.rotated
        if self.reindex and self.rotary is not None:
            source = index + self.fed - held + self.origin
            target = torch.arange(self.fed - index.shape[2], self.fed, device=index.device).expand_as(index)
            k, _ = self.recent.recall()
            bare = self.rotary.unrotate(k, self.rotary.table(source))
            k.copy_(self.rotary.rotate(bare, self.rotary.table(target + self.origin)))
            index = target
        elif not wanted:
            return
        elif self.positions is not None:
            index = self.positions.gather(2, index)
        else:
            index = index + self.fed - held
        if wanted:
            self.positions = index.contiguous()

    def _bulk_positions(self, low: int, high: int) -> torch.Tensor:
        """Positions of entries of the bulk, int64 [S] or [B,K,S]."""
        low, high = low + self.sinks.length, high + self.sinks.length
        held = torch.arange(low, high) + self._ahead() if self.positions is None else self.positions[:, :, low:high]
        return held + self.origin

    def recall(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        parts = [segment.recall() for segment in self._everything() if segment.length]
        return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2), 0

    def _segments(self) -> tuple[Segment, ...]:
        return self.sinks, self.bulk, self.recent

    def _everything(self) -> list[Shared | Rest | Segment]:
        return [*self.shared, *([] if self.rest is None else [self.rest]), *self._segments()]

    def buffers(self) -> Iterator[torch.Tensor]:
        for segment in self._everything():
            yield from segment.buffers()
        yield from (tag for tag in (self.positions, self.tokens, *self.queries) if tag is not None)
        for part in (self.selector, self.reader):
            if part is not None:
                yield from part.buffers()

    def entries(self) -> int:
        dropped = 0 if self.rest is None else self.rest.length
        return self._ahead() + dropped + sum(segment.length for segment in self._segments())

    def read_bytes(self) -> int:
        raw = sum(segment.read_bytes() for segment in self._everything() if segment is not self.bulk)
        return raw + (self.bulk.read_bytes() if self.reader is None else self.reader.read_bytes(self.bulk))

    def slow_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.bulk.buffers()) if self.bulk.slow else 0

    def moved_bytes(self) -> int:
        return self.bulk.moved

    def reorder(self, rows: torch.Tensor) -> None:
        for segment in self._everything():
            segment.reorder(rows)
        if self.positions is not None:
            self.positions = self.positions[rows]
        if self.tokens is not None:
            self.tokens = self.tokens[rows]
        for part in (self.selector, self.reader):
            if part is not None:
                part.reorder(rows)
