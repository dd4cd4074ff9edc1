"""Where runs of entries begin: units of unequal length, told apart as entries come, and the state of the newest one.

    "tokens"   behind an entry whose token is one of `ends`
    "keys"     at a key whose cosine with the key before it is below `apart`
    "queries"  at a decode step whose query's cosine with that of the decode step before, averaged over the query heads
               of a KV head, is below `apart` (LouisKV's semantic boundary, arXiv 2510.11292); never within a prompt

Runs are numbered from 0 by row and KV head, over all entries that ever came: an entry that a selection drops takes no
number away, and one that ended a run still does. `Cuts` holds the numbers of those entries that have not joined the
bulk yet. Entries on trial begin nothing.

Shapes: B batch, K KV heads of the lane, G query heads of each, T new entries, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvtool.cache.lane import Step
from kvtool.errors import InputError
from kvtool.slots import Read
from kvtool_kernels.precision import wide

STATE = ("tags", "number", "before", "begun", "steps", "total")


class Cuts:
    """State is replaced, never written into."""

    def __init__(self, spec: Read, layer: int):
        assert spec.cut is not None
        self.by, self.sums = spec.cut, spec.query == "run"
        self.ends = spec.ends
        self.apart = 0.0 if spec.apart is None else float(spec.apart[layer])
        self.tags: torch.Tensor | None = None  # run of each entry that waits for the bulk, int32 [B,K,N]
        self.number: torch.Tensor | None = None  # the newest run, int32 [B,K]
        self.before: torch.Tensor | None = None  # what the next entry is compared with: see `_begins`
        self.begun: torch.Tensor | None = None  # has a run begun since a choice was made for it? bool [B,K]
        self.steps: torch.Tensor | None = None  # decode steps of the newest run, int64 [B,K]
        self.total: torch.Tensor | None = None  # sum of their queries, [B,K,G,D], where they choose

    def receive(self, q: torch.Tensor | None, k: torch.Tensor, step: Step) -> None:
        """Entries with keys k [B,K,T,D] have come, and if these are one decode step, its queries q [B,H,1,D]."""
        decode = q is not None and q.shape[2] == 1 and (step.start > 0 or step.strict)
        grouped = q[:, :, 0].unflatten(1, (k.shape[1], -1)) if q is not None and decode else None
        begins = self._begins(grouped, k, step)
        any_begins = begins.any(-1)
        if self.number is None or self.begun is None or self.steps is None:
            self.number = torch.zeros(k.shape[:2], dtype=torch.int32, device=k.device)
            self.begun, self.steps = torch.zeros_like(any_begins), torch.zeros(k.shape[:2], device=k.device).long()
        tags = self.number[..., None] + begins.cumsum(-1, dtype=torch.int32)
        self.number, self.begun = tags[..., -1].clone(), self.begun | any_begins
        self.tags = tags if self.tags is None else torch.cat([self.tags, tags], 2)
        self.steps = self.steps.masked_fill(any_begins, 0) + decode
        if self.sums and grouped is not None:
            held = torch.zeros_like(wide(grouped)) if self.total is None else self.total
            self.total = held.masked_fill((self.steps == 1)[..., None, None], 0.0) + grouped

    def _begins(self, q: torch.Tensor | None, k: torch.Tensor, step: Step) -> torch.Tensor:
        """Which of the new entries begin a run, bool [B,K,T]; `before` is for the next: did the last one end a run, or
        its key [B,K,1,D], or the last decode step's query [B,K,G,D]."""
        none = torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device)
        if self.by == "tokens":
            if step.tokens is None:
                raise InputError("the plan looks at tokens", got="input embeddings", remedy="pass input_ids")
            assert self.ends is not None
            ends = torch.isin(step.tokens.to(k.device), self.ends.to(k.device))[:, None].expand(none.shape)
            first = none[..., :1] if self.before is None else self.before
            self.before = ends[..., -1:].clone()
            return torch.cat([first, ends[..., :-1]], -1)
        if self.by == "keys":
            first = k[:, :, :1] if self.before is None else self.before
            near = torch.cosine_similarity(wide(torch.cat([first, k[:, :, :-1]], 2)), wide(k), dim=-1)
            begins = near < self.apart
            if self.before is None:
                begins[..., 0] = False
            self.before = k[:, :, -1:].clone()
            return begins
        if q is None:
            return none
        last, self.before = self.before, q.clone()
        if last is None:
            return none
        return (torch.cosine_similarity(wide(last), wide(q), dim=-1).mean(-1) < self.apart)[..., None]

    def mean(self, q: torch.Tensor) -> torch.Tensor:
        """The mean query of the newest run's decode steps, or if there was none, q [B,K,G,D]."""
        if self.total is None or self.steps is None:
            return q
        steps = self.steps[..., None, None]
        return torch.where(steps > 0, self.total / steps.clamp_min(1), q)

    def due(self, young: torch.Tensor | None) -> torch.Tensor:
        """For which heads a run has begun since this was asked, bool [B,K]; where `young`, it will be asked again."""
        assert self.begun is not None
        begun = self.begun
        self.begun = torch.zeros_like(begun) if young is None else begun & young
        return begun

    def young(self, steps: int) -> torch.Tensor:
        """Which heads are within the first so many decode steps of a run, bool [B,K]."""
        assert self.steps is not None
        return self.steps <= steps

    def unfinished(self) -> int:
        """The first run that entries may still join when they join the bulk, of all rows and heads."""
        if self.tags is not None and self.tags.shape[2]:
            return int(self.tags[..., 0].min())
        return 0 if self.number is None else int(self.number.min())

    def leave(self, count: int) -> torch.Tensor:
        """The numbers int32 [B,K,count] of the oldest entries that wait, which leave."""
        assert self.tags is not None
        left, self.tags = self.tags[..., :count], self.tags[..., count:].clone()
        return left

    def take(self, index: torch.Tensor) -> None:
        """Of the entries that wait, only index int64 [B,K,N] are still there."""
        assert self.tags is not None
        self.tags = self.tags.gather(2, index)

    def buffers(self) -> Iterator[torch.Tensor]:
        yield from (held for name in STATE if (held := getattr(self, name)) is not None)

    def reorder(self, rows: torch.Tensor) -> None:
        for name in STATE:
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[rows])
