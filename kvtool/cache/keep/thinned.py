"""A bulk from which a selection takes entries: once the prompt is in, after each of its chunks, or at every step.

What it drops is freed, merged into what stays, or held on in a lower encoding (`store/rest.py`). Only raw entries are
selected from: they are all recent until that is done. Shapes as in `lane.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.keep import fused
from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Partial, Step
from kvtool.cache.segments import Segment
from kvtool.cache.share.shared import Shared
from kvtool.cache.store.rest import Rest
from kvtool.errors import InputError
from kvtool_kernels.ops import merge


class Thinned(Bulk):
    """reindex: what a selection keeps is moved up to the next token, so that positions are counted inside the cache.
    again: and what stands behind a dropped entry is to be fed again (`again.py`)."""

    def __init__(
        self, heads: list[int], *, selector: Selector, rest: Rest | None = None, reindex: bool = False,
        again: bool = False, **options: Any,
    ):  # fmt: skip
        super().__init__(heads, **options)
        self.selector, self.rest, self.reindex, self.again = selector, rest, reindex, again
        self.sound: int | None = None  # the first entries, if those behind them are to be fed again
        self.stepping = selector.spec.when == "step"
        self.selecting = True  # until the prompt is in, and the branch of a shared prefix never
        self.tokens: torch.Tensor | None = None  # int64 [B,K,N], where the selector looks at them
        self.finished = False
        key = self.encodings[0]
        bare = self.block is None and self.reader is None and rest is None and (key is None or key.rotated)
        bare = bare and not (reindex or again)
        self.simple = bare and fused.plain(selector)  # do entries leave without a trace?
        self.scoring = bare and fused.scores_at_once(selector)
        if rest is not None:
            self._watch(*rest.encodings)
            rest.coded.queries = self._seen

    def pieces(self, tokens: int) -> list[int]:
        return [1] * tokens if self.finished and self.stepping else super().pieces(tokens)

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        count = self._at_once(q, k, v, step)
        if count is None:
            return super()._one(q, k, v, step)
        self._receive(k, v, step, q)
        if count == self.recent.length and not self.selector.scores_all:
            self.selector.passed(None, q)
            return self.recent.attend(q, step)
        out = fused.turn(self.selector, q, *self.recent.recall(), count, step)
        self.recent.cut(self.recent.length - count)
        return out

    def _at_once(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> int | None:
        """How many entries stay after this decode step, if it is one operation."""
        if not (self.scoring and self.finished and q.shape[2] == 1 and self.positions is None):
            return None
        held = self.recent.length + 1
        count = self.selector.due(held, step.end(1))
        learns = any(x.requires_grad for x in (q, k, v, *self.buffers()))
        waiting = not self.selector.turn or learns or len(self.selector.queries) > bool(self.selector.spec.history)
        return count if held - count <= 1 and not waiting and super().plain(step) else None

    def _gap(self) -> bool:
        """Let those leave that leave whatever they score, if that is so; if not, or for once, say no."""
        held = self.recent.length
        count = self.selector.due(held, self.fed)
        first = fused.gap(self.selector, held, count) if self.positions is None else None
        if first is None:
            return False
        gone = min(held - count, held - first)  # sinks stay, even where more are asked for than stand behind them
        if gone and not self.recent.close(first, gone):
            return False
        self.selector.passed(None)
        return True

    def _quiet(self, q: torch.Tensor) -> bool:
        """Does this decode step change no score, so that nothing leaves that had not left before?"""
        tells = hasattr(self.selector.rule, "quiet") and self.finished and q.shape[2] == 1 and self.reader is None
        if not tells or self.tokens is None or not self.selector.turn or self.selector.queries:
            return False
        held = self.recent.length
        within = self.selector.picking.RAGGED or self.selector.due(held, self.fed) == held
        return within and self.selector.rule.quiet(self.selector.spec, self.tokens)

    def _observe(self, q: torch.Tensor, step: Step) -> None:
        """The selector remembers the queries of the newest entries, and evicts if it does so now."""
        if not q.shape[2] or not (self.selecting or self.stepping):
            return
        if self.simple and self.finished and q.shape[2] == 1 and self._gap():
            return
        if self._quiet(q):
            self.selector.passed(self.selector.running)
            return
        self.look(q, step)
        if self.finished or self.selector.spec.when == "chunk":
            self.evict(step)

    def _receive(self, k: torch.Tensor, v: torch.Tensor, step: Step, q: torch.Tensor | None = None) -> None:
        super()._receive(k, v, step, q)
        if "tokens" in self.selector.needs and (self.selecting or self.stepping):
            if step.tokens is None:
                raise InputError("the plan looks at tokens", got="input embeddings", remedy="pass input_ids")
            tokens = step.tokens.to(k.device)[:, None].expand(-1, len(self.heads), -1)
            self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=2)

    @property
    def _placed(self) -> bool:
        return super()._placed or "positions" in self.selector.needs or self.rest is not None

    def _most(self) -> int | None:
        return self.selector.most(self.fed) if self.finished and self.stepping else None

    def plain(self, step: Step) -> bool:
        rest = self.rest is not None and self.rest.length
        own = self.scoring or (self.stepping and self.selector.asks)
        return not rest and not own and super().plain(step)

    def _attend(self, q: torch.Tensor, step: Step, *, causal: bool) -> Partial:
        if not (self.finished and self.stepping and q.shape[2] == 1 and self.selector.asks):
            return super()._attend(q, step, causal=causal)
        out, self.selector.logits = self.recent.scored(q, step)
        return self._attend_before(q, step, out)

    def renew(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> Partial:
        self.recent.cut(k.shape[2])
        self.recent.append(k, v)
        return super()._attend(q, step, causal=True)

    def _attend_before(self, q: torch.Tensor, step: Step, out: Partial) -> Partial:
        out = super()._attend_before(q, step, out)
        return merge(self.rest.attend(q, step), out) if self.rest is not None and self.rest.length else out

    @property
    def _asks(self) -> bool:
        return self.stepping or super()._asks

    def _changes(self) -> tuple[str, str] | None:
        if self.rest is not None:
            return "demote", "holds dropped entries lower"
        return ("evict", "evicts at every step") if self.stepping else super()._changes()

    def branch(self) -> Bulk:
        made = super().branch()
        assert isinstance(made, Thinned)
        made.selector = copy.copy(self.selector)
        made.selector.memory = {}
        return made

    def finish(self) -> None:
        self.selecting = False
        self.selector.finish()
        self.tokens = self.tokens if self.stepping else None
        super().finish()

    def _unfitted(self) -> bool:
        waiting = self.rest is not None and any(encoding.fits for encoding in self.rest.encodings)
        return waiting or super()._unfitted()

    def look(self, q: torch.Tensor, step: Step) -> None:
        super().look(q, step)
        self.selector.observe(q, self.fed - q.shape[2], *self.recent.recall(), step, self._tags())

    def view(self, step: Step) -> View:
        """The entries held, which must all be recent, and the queries that were observed."""
        return self.selector.view(*self.recent.recall(), step, self._tags())

    def _tags(self) -> dict[str, torch.Tensor]:
        """What the selector's rules need to know of the entries held, which must all be recent, int64 [B,K,S]."""
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
        if self.selector.queries:
            held = self.recent.length
            count = self.selector.due(held, self.fed)
            if count == held and not self.selector.scores_all and not self.selector.picking.RAGGED:
                self.selector.settle(None, self.selector.limit or count)
                return
            view = self.view(step)
            scores = self.selector.scores(view)
            self.thin(view, scores, count, scores)

    def thin(self, view: View, scores: torch.Tensor, count: int, peers: torch.Tensor) -> None:
        """Of the entries in view, which are all that are held, keep `count` by scores [B,K,S], if there are more; peers
        as in `Choice`."""
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
                scores = scores.gather(2, index) if self.selector.remembers else scores
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
        selector = self.selector
        if self.again:
            stayed = int((index[0, 0] == torch.arange(index.shape[2], device=index.device)).sum())
            self.sound = stayed if self.sound is None else min(self.sound, stayed)
        if self.tokens is not None:
            self.tokens = self.tokens.gather(2, index)
        if self.reader is not None:
            self.reader.take(index)
        wanted = super()._placed or (selector.spec.when != "prefill" and "positions" in selector.needs)
        if self.reindex and self.rotary is not None:
            source = index + self.fed - held + self.origin
            target = torch.arange(self.fed - index.shape[2], self.fed, device=index.device).expand_as(index)
            k, _ = self.recent.recall()
            bare = self.rotary.unrotate(k, self.rotary.table(source))
            k.copy_(self.rotary.rotate(bare, self.rotary.table(target + self.origin)))
            index = target
        elif not wanted:
            self.positions = None
            return
        elif self.positions is not None:
            index = self.positions.gather(2, index)
        else:
            index = index + self.fed - held
        if wanted:
            self.positions = index.contiguous()

    def _everything(self) -> list[Shared | Rest | Segment]:
        held = super()._everything()
        return held if self.rest is None else [self.rest, *held]

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from super().buffers()
        yield from self.selector.buffers()
        if self.tokens is not None:
            yield self.tokens

    def entries(self) -> int:
        return super().entries() + (0 if self.rest is None else self.rest.length)

    def reorder(self, rows: torch.Tensor) -> None:
        super().reorder(rows)
        self.selector.reorder(rows)
        self.tokens = None if self.tokens is None else self.tokens[rows]
