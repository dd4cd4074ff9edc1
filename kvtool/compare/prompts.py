"""The prompts that all cells of a scoreboard share, made by the tasks, named by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from kvtool import options, registry
from kvtool.corpus.base import Sample
from kvtool.errors import InputError, unknown
from kvtool.files import digest
from kvtool.model import Model
from kvtool.replay.verdict import task

ASKS = ("known", "after")


@dataclass(frozen=True)
class Prompt:
    """`task` by name; `first`: is it the first of its length, on which steps are timed?"""

    task: str
    sample: Sample
    first: bool

    @cached_property
    def key(self) -> str:
        """A name that depends on the content alone."""
        assert self.sample.answer is not None
        return f"{self.task}/{digest(self.sample.tokens, self.sample.answer, str(self.sample.question))}"

    @property
    def module(self) -> ModuleType:
        return task(self.task)

    def end(self, ask: str) -> int:
        """Tokens that are compressed: all but the last one, or those before the question."""
        question = self.sample.question
        return len(self.sample.tokens) - 1 if ask == "known" or question is None else question

    def follow(self, ask: str) -> torch.Tensor:
        """What is decoded after that, int64 [N]: the rest of the prompt, and the answer but for its last token."""
        assert self.sample.answer is not None
        return torch.cat([self.sample.tokens[self.end(ask) :], self.sample.answer[:-1]])


def every_task() -> list[str]:
    """The tasks that plans can be compared by: those whose prompts have answers."""
    return [name for name in registry.names("replay/tasks") if hasattr(task(name), "compared")]


def chosen(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Task → its options. Raises InputError for a task that cannot be compared by, and for bad options."""
    known = every_task()
    for name in names:
        if name not in known:
            raise unknown("task of a comparison", name, known)
    return {name: options.build(task(name).Options, {**task(name).SHORT, **settings.get(name, {})}, name)
            for name in names}  # fmt: skip


def prompts(model: Model, tasks: Mapping[str, Any], lengths: Sequence[int], seed: int) -> list[Prompt]:
    """Short ones first. Raises InputError when a length leaves no room for a task's question."""
    made: list[Prompt] = []
    for length in lengths:
        first = len(made)
        for name, chosen in tasks.items():
            for sample in task(name).compared(model, chosen, length, seed).samples:
                made.append(Prompt(name, sample, first=len(made) == first))
    keys = [prompt.key for prompt in made]
    if len(set(keys)) < len(keys):
        raise InputError("two prompts are the same", remedy="ask for fewer samples")
    return made


def asks(prompt: Prompt, wanted: Sequence[str]) -> list[str]:
    """How the prompt is asked, the shorter part first; a text without a question only as it is."""
    if not prompt.module.ASKED:
        return ["known"]
    return [ask for ask in ("after", "known") if ask in wanted]
