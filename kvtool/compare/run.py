"""The race: every prompt is prefilled once, and every entrant is judged on what it makes of that prefill.

    for each prompt:   feed the context → entrants under "after" → feed the question → entrants under "known"

A plan that leaves prefill dense adopts the full cache; one that evicts while the prompt comes in, and every plan under
the protocol "strict", is fed itself. What follows is forced in one forward (`kvtool/replay/forced.py`), so that a
prompt costs an entrant one adoption and one chunk. Those that adopt and score the prompt's entries alike share the
scores (`kvtool/cache/keep/memo.py`), and whoever is handed them is charged for them. On the first prompt of every
length a few real decode steps are timed, in turns with the full cache's, and their logits held against the forced ones.

One prompt's full cache is held at a time, and one entrant's beside it. An entrant that fails is out; the others go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtool.cache.keep.memo import Account, Memo, named
from kvtool.cache.segment_cache import Protocol, SegmentCache
from kvtool.compare.journal import Key, Scores
from kvtool.compare.plans import Entrant, told
from kvtool.compare.prompts import Prompt, asks
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.forced import forced


@dataclass(frozen=True)
class Rules:
    """How all entrants are fed. `chunk`: tokens at a time where prefill is an entrant's own, and dense; `steps`: decode
    steps timed a side."""

    asks: tuple[str, ...] = ("known", "after")
    protocol: Protocol = "official"
    chunk: int = 512
    steps: int = 8


@dataclass(frozen=True)
class Reference:
    """The full cache after a prompt: what it answers, logits fp32 [A,V], and what it costs."""

    logits: torch.Tensor
    held: int
    read: int
    prefill: float
    copied: float  # seconds of adoption without compression


@dataclass(frozen=True)
class Filled:
    """The full cache after a prompt, and what has been observed of it so far."""

    cache: SegmentCache
    memo: Memo


class Race:
    """`progress(text)` is called once for every prompt × ask × entrant that was not in the journal."""

    def __init__(
        self, model: Model, entrants: Sequence[Entrant], journal: Scores, rules: Rules,
        progress: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.model, self.journal, self.rules, self.progress = model, journal, rules, progress
        self.entrants = [entrant for entrant in entrants if not entrant.trouble]
        self.failed: dict[str, str] = {entrant.cell.key: entrant.trouble for entrant in entrants if entrant.trouble}
        plans = [entrant.plan for entrant in self.entrants if entrant.plan is not None]
        self.names = {id(plan): named(plan) for plan in plans}  # of their observations; entrants hold the plans

    def run(self, prompts: Sequence[Prompt]) -> None:
        """All that the journal lacks; afterwards `failed` says who is out, and why."""
        with self.model.served():
            for prompt in prompts:
                todo = {ask: self._todo(prompt, ask) for ask in asks(prompt, self.rules.asks)}
                if any(todo.values()):
                    self._prompt(prompt, todo)

    def units(self, prompts: Sequence[Prompt]) -> int:
        """How many times `progress` will be called if nobody fails."""
        return sum(len(self._todo(prompt, ask)) for prompt in prompts for ask in asks(prompt, self.rules.asks))

    def _todo(self, prompt: Prompt, ask: str) -> list[Entrant]:
        """Who has not answered this yet."""
        found = []
        for entrant in self.entrants:
            known = self.journal.scores.get(key(prompt, ask, entrant))
            lacks = known is None or (self._timed(prompt, ask) and "decode_seconds" not in known)
            if lacks and entrant.cell.key not in self.failed:
                found.append(entrant)
        return found

    def _timed(self, prompt: Prompt, ask: str) -> bool:
        return prompt.first and ask == "known" and self.rules.steps > 0

    def _prompt(self, prompt: Prompt, todo: dict[str, list[Entrant]]) -> None:
        full, fed, seconds = SegmentCache(self.model), 0, 0.0
        record(full, [entrant.plan for group in todo.values() for entrant in group if entrant.plan is not None])
        for ask, group in todo.items():
            end = prompt.end(ask)
            seconds += _seconds(lambda: self._feed(full, prompt.sample.tokens[fed:end], 0))  # noqa: B023 (called at once)
            fed = end
            if group:
                self._stage(prompt, ask, group, full, seconds)

    def _stage(self, prompt: Prompt, ask: str, group: list[Entrant], cache: SegmentCache, seconds: float) -> None:
        full = Filled(cache, Memo())
        reference = self._reference(prompt, ask, full, seconds)
        for entrant in group:
            if entrant.cell.key in self.failed:
                continue
            start = time.perf_counter()
            try:
                scores = self._judge(prompt, ask, entrant, full, reference)
            except Exception as error:
                self.failed[entrant.cell.key] = told(error)
            else:
                spent = {"spent_seconds": time.perf_counter() - start}
                self.journal.score(key(prompt, ask, entrant), scores | spent)
            self.progress(f"{prompt.task} {len(prompt.sample.tokens)} tokens, {ask}: {entrant.cell.key}")

    def _reference(self, prompt: Prompt, ask: str, full: Filled, seconds: float) -> Reference:
        cache, copied = self._filled(None, prompt, ask, full)
        held, read = cache.nbytes, cache.read_bytes
        return Reference(self._answer(cache, prompt, ask), held, read, seconds, copied)

    def _judge(self, prompt: Prompt, ask: str, entrant: Entrant, full: Filled, reference: Reference) -> dict[str, Any]:
        """What the journal keeps of one entrant on one prompt."""
        assert prompt.sample.answer is not None
        cache, seconds = self._filled(entrant.plan, prompt, ask, full)
        if self._dense(entrant.plan):  # what compression adds to the prefill that everybody shares
            seconds = reference.prefill + (seconds - reference.copied if entrant.plan is not None else 0.0)
        found: dict[str, Any] = {
            "bytes": cache.nbytes, "bytes_full": reference.held, "read": cache.read_bytes, "read_full": reference.read,
            "prefill_seconds": seconds, "prefill_seconds_full": reference.prefill,
        }  # fmt: skip
        logits = self._answer(cache, prompt, ask)
        found["scores"] = prompt.module.score(reference.logits, logits, prompt.sample.answer)
        if self._timed(prompt, ask):
            found |= self._steps(prompt, entrant, full, logits)
        return found

    def _filled(self, plan: Plan | None, prompt: Prompt, ask: str, full: Filled) -> tuple[SegmentCache, float]:
        """A cache of the plan that has seen the prompt, and the seconds that takes it alone."""
        end = prompt.end(ask)
        dense = self._dense(plan)
        protocol: Protocol = "official" if dense else self.rules.protocol
        cache = SegmentCache(self.model, plan, protocol=protocol, prompt_length=end)
        cache.tell(prompt.follow(ask)[None])
        if dense:
            account = self._account(plan, full.memo)
            seconds = _seconds(lambda: cache.adopt(full.cache, account))
            return cache, seconds + (0.0 if account is None else account.spared)
        return cache, _seconds(lambda: self._feed(cache, prompt.sample.tokens[:end], self.rules.chunk))

    def _account(self, plan: Plan | None, memo: Memo) -> Account | None:
        return None if plan is None else memo.account(self.names[id(plan)])

    def _dense(self, plan: Plan | None) -> bool:
        """Is the plan's prefill the full cache's, so that the two can share one?"""
        if plan is None:
            return True
        select = plan.keep.select if plan.keep is not None else None
        return plan.dense and self.rules.protocol == "official" and not (select is not None and select.when == "chunk")

    def _feed(self, cache: SegmentCache, tokens: torch.Tensor, chunk: int) -> None:
        """tokens int64 [T], `chunk` at a time, or at once if that is 0 or the plan wants it."""
        with torch.no_grad():
            size = (0 if cache.at_once else chunk) or len(tokens)
            for piece in tokens.split(size) if len(tokens) else ():
                self.model.network.base_model(input_ids=piece[None].to(self.model.device), past_key_values=cache)
        cache.finish()

    def _answer(self, cache: SegmentCache, prompt: Prompt, ask: str) -> torch.Tensor:
        """Logits fp32 [A,V] along the answer."""
        assert prompt.sample.answer is not None
        question = len(prompt.sample.tokens) - 1 - prompt.end(ask)
        return forced(self.model, cache, prompt.follow(ask)[None], question)[0, -len(prompt.sample.answer) :]

    def _steps(self, prompt: Prompt, entrant: Entrant, full: Filled, logits: torch.Tensor) -> dict[str, Any]:
        """Decode steps of both sides in turns: median seconds, and how far the plan's logits are from the forced."""
        sides = [self._filled(plan, prompt, "known", full)[0] for plan in (entrant.plan, None)]
        tokens = prompt.follow("known")
        times: list[list[float]] = [[], []]
        gap = 0.0
        for at in range(self.rules.steps):
            token = tokens[at % len(tokens)].view(1, 1).to(self.model.device)
            for side, cache in enumerate(sides):
                start = time.perf_counter()
                with torch.no_grad():
                    row = self.model.network(input_ids=token, past_key_values=cache).logits[0, -1].float().cpu()
                times[side].append(time.perf_counter() - start)
                if side == 0 and at < len(logits):
                    gap = max(gap, float((row - logits[at]).abs().max()))
        mine, theirs = (statistics.median(found) for found in times)
        return {"decode_seconds": mine, "decode_seconds_full": theirs, "forced_gap": gap}


def key(prompt: Prompt, ask: str, entrant: Entrant) -> Key:
    """How the journal names what an entrant made of a prompt."""
    return prompt.key, ask, entrant.cell.key, entrant.identity


def record(full: SegmentCache, plans: Sequence[Plan]) -> None:
    """Let `full` keep the queries that caches of any of these plans need to adopt it."""
    most = 0
    for plan in plans:
        full.record_for(plan)
        now = max(layer.record for layer in full.segments), min(layer.record for layer in full.segments)
        most = -1 if -1 in (most, *now) else max(most, now[0])
    for layer in full.segments:
        layer.record = most


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
