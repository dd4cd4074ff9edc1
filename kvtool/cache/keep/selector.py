"""Scored eviction in one lane, stage by stage: observe → score → pool → reduce over the group → pick.

A `Selector` belongs to one lane. It keeps the queries that its rule looks at until they have scored the entries held;
`scores` runs the first stages, `limits` resolves budgets, `choose` picks. What the heads of a layer or of the model
share is dealt out by the caller, who sees all lanes (`selection.py`); what becomes of the others is in `merges/`.

Shapes as in `lane.py`; S entries held, in order. A query's place among them is counted from the end, since what was
evicted stood before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool.cache.keep.memo import Account, Score
from kvtool.cache.keep.merges._base import Job
from kvtool.cache.keep.picks._base import Choice
from kvtool.cache.keep.scores._base import View
from kvtool.cache.lane import Step
from kvtool.cache.read.board import Board
from kvtool.rotary import NONE, Rotary
from kvtool.slots import Select

AHEAD = 16  # decode steps whose entries a growing budget makes room for
PROBED = 0.05  # share of the newest queries, and of the others, that "probes" looks at (ZipCache, section 4.2)
Tags = dict[str, torch.Tensor]


def probes(queries: int, seed: int) -> torch.Tensor:
    """Which of so many queries are probes: the newest, and a seeded draw of the others; int64, ascending."""
    count = max(1, round(PROBED * queries))
    others = torch.randperm(queries - count, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.cat([others.sort().values, torch.arange(queries - count, queries)])


class Selector:
    """`budget`: of each of the lane's heads, as in `Select`; `layer` and `heads` say where they are.

    `prompt_length` resolves shares of the prompt where entries go before all of it is in; else it is found out. While
    a prompt is adopted, `board` may have an account through which its scores are shared with other caches (`memo.py`).
    """

    def __init__(
        self, spec: Select, budget: list[float], layer: int, heads: list[int], prompt_length: int = 0,
        rotary: Rotary = NONE, board: Board | None = None,
    ):  # fmt: skip
        self.spec, self.budget, self.layer, self.heads, self.rotary = spec, budget, layer, heads, rotary
        self.rule, self.picking, self.merging = spec.rule("score"), spec.rule("pick"), spec.rule("merge")
        self.needs = {need for rule in (self.rule, self.picking, self.merging) for need in getattr(rule, "NEEDS", ())}
        self.needs |= {"tokens"} if spec.observe == "rebuild" else set()
        self.prompt_length, self.board = prompt_length, board
        self.queries: list[torch.Tensor] = []
        self.first: list[int] = []
        self.running: torch.Tensor | None = None  # scores of the entries held, if they will be scored again
        self.memory: Tags = {}  # what the rules keep, besides
        self.turn = 0
        self.logits: torch.Tensor | None = None  # of the only query that is remembered, if attention has them
        self.limit = 0  # entries a head may hold, once that is settled
        old = bool(spec.decay) or spec.reduce == "max"
        self.remembers = self.rule.SEES == "own" or (self.rule.SEES == "queries" and old)
        self.scores_all = self.remembers or getattr(self.rule, "RECALLS", False)  # also steps at which nothing leaves
        self.blind = getattr(self.picking, "BLIND", False) and not getattr(self.merging, "SCORES", False)
        if spec.when == "chunk":
            self.limit = self.limits(self.prompt_length)[0]

    def observe(self, q: torch.Tensor, start: int, k: torch.Tensor, v: torch.Tensor, step: Step, tags: Tags) -> None:
        """q [B,H,T,D] at positions start …, the newest: remember those that the rule may look at. k, v [B,K,S,D] are
        the entries that end with the queries' own."""
        if self.rule.SEES == "own":
            self._score_own(q, k, v, step, tags)
        if self.rule.SEES != "queries" or self.spec.on_trial or self._idle:
            q, start = q[:, :, :0], start + q.shape[2]
        most = self._most()
        if most is not None:
            q, start = q[:, :, -most:], start + max(0, q.shape[2] - most)
            while self.queries and sum(x.shape[2] for x in self.queries[1:]) + q.shape[2] >= most:
                self.queries.pop(0)
                self.first.pop(0)
        self.queries.append(q.clone())
        self.first.append(start)

    @property
    def asks(self) -> bool:
        """Are the logits of a decode step's query what the next choice is made by?"""
        alone = self.spec.when == "step" and not self.spec.history and not self.queries
        return alone and self.rule.SEES == "queries" and not self._idle

    @property
    def _idle(self) -> bool:
        """Does nothing look at scores any more?"""
        return self.blind and self.turn > 0

    def _most(self) -> int | None:
        """Newest queries that may be looked at; None: all that come, or a share of them that is not known yet."""
        if self.spec.history and self.turn:
            return self.spec.history
        return int(self.spec.observed) if self.spec.observe == "last" and self.spec.observed >= 1 else None

    def _score_own(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, tags: Tags) -> None:
        count = q.shape[2]
        tags = {name: tag[:, :, -count:] for name, tag in tags.items()}
        view = self.seen(q, torch.arange(count, device=q.device), k[:, :, -count:], v[:, :, -count:], step, tags)
        new = self._made(lambda: self.rule.score(view))
        self.running = new if self.running is None else torch.cat([self.running, new], dim=2)

    def credit(self, view: View, entries: slice) -> None:
        """Score some entries in view, once and for all; they are the next of those held."""
        new = self._reduced(self.rule.score(view)[:, :, entries])
        self.running = new if self.running is None else torch.cat([self.running, new], dim=2)

    def _observed(self, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B,H,N,D] and their places int64 [N] among so many entries, of which the last is the newest query's own."""
        shift = entries - self.first[-1] - self.queries[-1].shape[2]
        places = [
            torch.arange(at + shift, at + shift + x.shape[2]) for at, x in zip(self.first, self.queries, strict=True)
        ]
        one = len(places) == 1
        q, rows = (self.queries[0], places[0]) if one else (torch.cat(self.queries, dim=2), torch.cat(places))
        most = self._most()
        if most is None and self.spec.observe == "last":
            most = max(1, round(self.spec.observed * len(rows)))
        if most is not None:
            q, rows = q[:, :, -most:], rows[-most:]
        elif self.spec.observe == "probes" and len(rows):
            chosen = probes(len(rows), self.spec.seed)
            q, rows = q[:, :, chosen.to(q.device)], rows[chosen]
        return q, rows.to(q.device)

    def view(self, k: torch.Tensor, v: torch.Tensor, step: Step, tags: Tags) -> View:
        """The entries k, v [B,K,S,D] and the observed queries."""
        return self.seen(*self._observed(k.shape[2]), k, v, step, tags).shared(self._account)

    def seen(
        self, q: torch.Tensor, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, tags: Tags
    ) -> View:
        """What a rule is given of these queries and entries, as in `View`."""
        return View(
            q, rows, k, v, step.scale, step.softcap, self.spec, self.layer, self.heads, self.turn, tags, self.rotary,
            self.memory, self.logits,
        )  # fmt: skip

    def scores(self, view: View) -> torch.Tensor:
        """Scores of the entries in view per KV head, [B,K,S], old scores included."""
        if self._idle:
            return torch.zeros(1, dtype=torch.float32, device=view.k.device).expand(view.k.shape[:3])
        if self.rule.SEES == "own" or self.spec.on_trial:
            assert self.running is not None
            new = self.running
        else:
            new = self._made(lambda: self._reduced(self.rule.score(view)))
            if self.running is not None and self.remembers:
                before = new[:, :, : self.running.shape[2]]
                if self.spec.reduce == "max":
                    torch.maximum(before, self.spec.decay * self.running, out=before)
                else:
                    before += self.spec.decay * self.running
        return new.mean(1, keepdim=True).expand_as(new) if self.spec.alike else new

    @property
    def _account(self) -> Account | None:
        return None if self.board is None or self.turn else self.board.account

    def _made(self, scores: Score) -> torch.Tensor:
        """Scores of the prompt's entries, by this cache or by another one that adopts the same prompt."""
        account = self._account
        return scores() if account is None else account.score(self.layer, self.heads, scores)

    def _reduced(self, scores: torch.Tensor) -> torch.Tensor:
        """[B,H,S] or [B,K,S] → [B,K,S], pooled."""
        kv_heads = len(self.heads)
        group = scores.shape[1] // kv_heads
        if self.spec.weights is not None and self.rule.SEES == "queries":
            factors = self.spec.weights[self.layer].unflatten(0, (-1, group))[self.heads].flatten()
            scores = scores * factors.to(scores)[:, None]
        if self.spec.group_first:
            return self._pooled(self._grouped(scores.unflatten(1, (kv_heads, group))))
        return self._grouped(self._pooled(scores).unflatten(1, (kv_heads, group)))

    def _grouped(self, scores: torch.Tensor) -> torch.Tensor:
        """[B,K,G,S] → [B,K,S]."""
        how = self.spec.group
        return scores.amax(2) if how == "max" else scores.mean(2) if how == "mean" else scores.sum(2)

    def _pooled(self, scores: torch.Tensor) -> torch.Tensor:
        size = self.spec.kernel
        if self.spec.pool == "none" or size == 1:
            return scores
        pool = torch.nn.functional.avg_pool1d if self.spec.pool == "mean" else torch.nn.functional.max_pool1d
        return pool(scores, size, 1, size // 2)

    def free(self, entries: int) -> slice:
        """The entries, of so many, that do not stay whatever they score; at decode steps the newest always stays."""
        recent = int(self.spec.recent) if self.spec.recent >= 1 else round(self.spec.recent * self.prompt_length)
        recent = max(recent, int(self.spec.when == "step" and self.turn > 0))
        low = min(self.spec.sink, entries)
        return slice(low, max(low, entries - recent))

    def limits(self, entries: int) -> list[int]:
        """Entries that each head may hold after a prompt of so many."""
        return [max(1, self.spec.minimum, round(b * entries) if b <= 1 else int(b)) for b in self.budget]

    def most(self, fed: int) -> int | None:
        """Entries that decode steps will hold at once, for the next of them at least, after `fed` tokens; if known."""
        if self.spec.when != "step" or not self.limit:
            return None
        return 1 + (self.limits(fed + AHEAD)[0] if self.spec.growing else self.limit)

    def due(self, held: int, fed: int) -> int:
        """How many of so many entries stay at a decode step, after `fed` tokens in all."""
        limit = self.limits(fed)[0] if self.spec.growing else self.limit
        spare = self.spec.slack if self.spec.slack >= 1 else round(self.spec.slack * limit)
        return held if held <= limit else max(1, limit - int(spare))

    def choose(self, view: View, scores: torch.Tensor, count: int, peers: torch.Tensor) -> torch.Tensor:
        """The entries that stay, in order, int64 [B,K,N]; peers as in `Choice`."""
        return self.picking.pick(Choice(view, scores, count, self.free(scores.shape[2]), peers))

    def job(self, view: View, scores: torch.Tensor, counts: torch.Tensor, index: torch.Tensor) -> Job:
        """What the merging rule is given."""
        return Job(view, scores, counts, index, self.free(scores.shape[2]))

    def settle(self, scores: torch.Tensor | None, limit: int) -> None:
        """A choice is made: forget the queries, and remember what the next one needs of scores [B,K,N] of the kept.
        What was dealt out at the prompt's end goes on as a share, if budgets grow."""
        if self.spec.growing and not self.turn and limit != self.limits(self.prompt_length)[0]:
            self.budget = [limit / self.prompt_length] * len(self.budget)
        last = torch.cat(self.queries, dim=2)[:, :, -self.spec.history :] if self.spec.history else None
        end = self.first[-1] + self.queries[-1].shape[2]
        self.logits = None
        self.queries = [] if last is None else [last.clone()]
        self.first = [] if last is None else [end - last.shape[2]]
        if self.spec.when != "prefill":
            self.limit = limit
            self.turn += 1
            self.running = scores
            if scores is not None:
                self.running = scores.contiguous() if self.remembers and not self._idle else None

    def passed(self, scores: torch.Tensor | None, q: torch.Tensor | None = None) -> None:
        """A decode step is over, without the stages; the next one needs these scores [B,K,N] of the kept, and the query
        q [B,H,1,D], if it looks at earlier ones too."""
        self.turn += 1
        self.running = scores
        if self.spec.history and q is not None:
            end = self.first[-1] + self.queries[-1].shape[2] + 1
            earlier = self.past()
            last = q.clone() if earlier is None else torch.cat([earlier, q], dim=2)
            self.queries, self.first = [last], [end - last.shape[2]]

    def past(self) -> torch.Tensor | None:
        """The queries [B,H,N,D] that score with the next one, of the tokens just before it."""
        count = self.spec.history - 1
        return self.queries[0][:, :, -count:] if count > 0 and self.queries else None

    def finish(self) -> None:
        """The prompt is in."""
        if self.spec.when != "step":
            self.running = None

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from self.queries
        yield from self.memory.values()
        if self.running is not None:
            yield self.running

    def reorder(self, rows: torch.Tensor) -> None:
        self.queries = [q[rows] for q in self.queries]
        self.memory = {name: tensor[rows] for name, tensor in self.memory.items()}
        self.running = None if self.running is None else self.running[rows]
