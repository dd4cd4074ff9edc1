"""A race in several processes: each takes the next prompt, the longest first, and tells what it finds.

Every process loads the model for itself, and has its share of the threads. Only the one that started them writes the
journal, so that an interruption costs what an interrupted race costs: the prompts that were under way.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtool.compare.journal import Key
from kvtool.compare.plans import Entrant, told
from kvtool.compare.prompts import Prompt
from kvtool.compare.run import Race, Rules
from kvtool.errors import RunError
from kvtool.model import Model

WAIT = 2.0  # seconds without news after which it is asked whether all processes are alive
SCORE, STEP, FAILED, DONE, BROKEN = "score", "step", "failed", "done", "broken"  # what a process says


@dataclass
class _Told:
    """A journal that is another process's: `say` tells it."""

    say: Callable[[tuple[str, Any]], None]
    scores: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def score(self, key: Key, scores: dict[str, Any]) -> None:
        self.scores[key] = scores
        self.say((SCORE, (key, scores)))


def run(race: Race, prompts: Sequence[Prompt], jobs: int, loaded: Callable[[], Model]) -> None:
    """As `race.run(prompts)`. `loaded` is sent to the processes, and gives each of them the race's model. Raises
    RunError if one of them dies."""
    left = [number for number, prompt in enumerate(prompts) if race.units([prompt])]
    left.sort(key=lambda number: -len(prompts[number].sample.tokens))
    jobs = min(jobs, len(left))
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may stand still
    todo, news = context.Queue(), context.Queue()
    for number in [*left, *[None] * jobs]:
        todo.put(number)
    threads = max(1, torch.get_num_threads() // max(1, jobs))
    given = (loaded, threads, race.entrants, prompts, race.rules, race.journal.scores, todo, news)
    workers = [context.Process(target=_work, args=given, daemon=True) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        while jobs:
            try:
                kind, content = news.get(timeout=WAIT)
            except queue.Empty:
                _check([worker.exitcode for worker in workers])
                continue
            jobs -= kind == DONE
            _heard(race, kind, content)
    finally:
        for worker in workers:
            if worker.pid:
                worker.terminate()
                worker.join()


def _heard(race: Race, kind: str, content: Any) -> None:
    if kind == SCORE:
        race.journal.score(*content)
    elif kind == STEP:
        race.progress(content)
    elif kind == FAILED:
        race.failed |= content
    elif kind == BROKEN:
        raise RunError(f"a job of the comparison failed: {content}")


def _check(codes: Sequence[int | None]) -> None:
    for code in codes:
        if code:
            raise RunError(f"a job of the comparison died with exit code {code}: pass --resume with fewer --jobs")


def _work(
    loaded: Callable[[], Model], threads: int, entrants: Sequence[Entrant], prompts: Sequence[Prompt], rules: Rules,
    known: dict[Key, dict[str, Any]], todo: Any, news: Any,
) -> None:  # fmt: skip
    """One of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    try:
        torch.set_num_threads(threads)
        race = Race(loaded(), entrants, _Told(news.put, known), rules, lambda text: news.put((STEP, text)))
        for number in iter(todo.get, None):
            race.run([prompts[number]])
            news.put((FAILED, race.failed))
    except Exception as error:
        news.put((BROKEN, told(error)))
    news.put((DONE, None))
