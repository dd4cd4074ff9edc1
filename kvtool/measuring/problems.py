"""Prompts whose answers can be checked, for training on rewards: tasks in turn, and only what the model can do.

passkey, needle and two-hop come from their corpora, over the calibration half of the default text, which no replay
measures on. repeat is a random string and the first half of its copy: the next tokens are the answer. An answer is
right when all its tokens are; nothing is parsed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from kvtool.corpus.base import Sample
from kvtool.corpus.needle import needle
from kvtool.corpus.passkey import passkey
from kvtool.corpus.repeat import repeat
from kvtool.corpus.twohop import twohop
from kvtool.errors import InputError, unknown
from kvtool.model import Model

DEPTHS = (0.1, 0.3, 0.5, 0.7)
REPEATED = 8  # tokens of a repeated string that are asked for
HALF = "calibration"
SURPLUS = 3  # candidates a problem


def problems(
    model: Model,
    tasks: Sequence[str],
    lengths: Sequence[int],
    count: int,
    *,
    seed: int,
    solved: bool = True,
    found: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """At most `count` prompts with answers, of `lengths` tokens, tasks and lengths in turn; with `solved` those whose
    answer the model itself gives greedily. `found` is called with the number so far. Raises InputError when there is
    none, or for an unknown task."""
    made: list[Sample] = []
    for sample in _candidates(model, tasks, lengths, count, seed):
        if not solved or solves(model, sample):
            made.append(sample)
            found(len(made))
        if len(made) == count:
            break
    if not made:
        raise InputError(
            "the model solves none of the problems", got=f"tasks {', '.join(tasks)} at {lengths} tokens",
            remedy="choose other tasks or lengths",
        )  # fmt: skip
    return made


def solves(model: Model, problem: Sample) -> bool:
    """Is the answer what the unchanged model writes greedily?"""
    assert problem.answer is not None
    ids = torch.cat([problem.tokens, problem.answer])[None, :-1].to(model.device)
    with torch.no_grad():
        logits = model.network(input_ids=ids, logits_to_keep=len(problem.answer)).logits[0]
    return torch.equal(logits.argmax(-1).cpu(), problem.answer)


def _candidates(model: Model, tasks: Sequence[str], lengths: Sequence[int], count: int, seed: int) -> Iterator[Sample]:
    """More than `count`, lazily: each task at each length, then again."""
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    each = -(-SURPLUS * count // (len(tasks) * len(lengths)))
    kinds = [TASKS[task](model, length, each, seed) for length, task in itertools.product(lengths, tasks)]
    return itertools.chain.from_iterable(zip(*kinds, strict=True))


def _passkey(model: Model, length: int, count: int, seed: int) -> list[Sample]:
    keys = -(-count // len(DEPTHS))
    made = passkey(model, lengths=[length], depths=DEPTHS, keys=keys, seed=seed, haystack=HALF).samples
    return [made[depth * keys + key] for key in range(keys) for depth in range(len(DEPTHS))][:count]


def _needle(model: Model, length: int, count: int, seed: int) -> list[Sample]:
    rounds = -(-count // len(DEPTHS))
    made = needle(model, lengths=[length] * rounds, depths=DEPTHS, samples=1, seed=seed, haystack=HALF)
    return list(made.samples)[:count]


def _twohop(model: Model, length: int, count: int, seed: int) -> list[Sample]:
    return list(twohop(model, lengths=[length], samples=count, seed=seed, haystack=HALF).samples)


def _repeat(model: Model, length: int, count: int, seed: int) -> list[Sample]:
    start = len(model.start)
    period = max(2, 2 * (length - start) // 3)
    cut = start + period + period // 2
    asked = slice(cut, min(cut + REPEATED, start + 2 * period))
    made = repeat(model, period=period, copies=2, samples=count, seed=seed)
    return [replace(sample, tokens=sample.tokens[:cut], answer=sample.tokens[asked]) for sample in made.samples]


TASKS: dict[str, Callable[[Model, int, int, int], list[Sample]]] = {
    "passkey": _passkey,
    "needle": _needle,
    "repeat": _repeat,
    "two-hop": _twohop,
}
