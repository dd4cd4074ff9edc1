"""What is observed of a prompt, made once for all the caches that adopt the same prefill.

    memo = Memo()
    for plan in plans:  cache.adopt(full, account := memo.account(named(plan)));   cost = seconds + account.spared

Which entries stay depends on a budget; what their scores are does not. A key says all that a result depends on besides
the prefill: the rule with every setting but those in `LATER`, the layer, and the heads that are scored together. What
only decides later is in no key, so that one method's budgets share a scoring, and so do methods that score alike. Only
scores are held, [B,K,S] or [B,H,S], never probabilities; they go with the memo, which lives for one prompt.

An account is one cache's. It says what the cache did not spend: the seconds that others took to make what it was
handed. A part of several results, like the payments that a score is made of, counts once for each cache, as it would
be computed once there. It knows neither rules nor plans by name, and nothing of decode steps, which share nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from json import dumps
from typing import Any

import torch

from kvtool import records
from kvtool.files import digest
from kvtool.plan import Plan
from kvtool.slots import Keep, Select

LATER = (
    "budget", "spread", "floor", "mass", "least", "pick", "minimum", "recent", "slack", "growing", "merge", "threshold",
    "weigh", "count",
)  # fmt: skip  # fields of a selection that act on scores: no scoring rule reads them
PAID = ("observe", "observed", "seed", "temperature", "warming", "reduce", "variance")  # those that payments depend on
Key = tuple[Hashable, ...]
Score = Callable[[], torch.Tensor]
Make = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Names:
    """What a plan's observations are known by: those of its rule alone, and those of passes through all that the plan
    holds."""

    rule: str
    plan: str


def named(plan: Plan) -> Names | None:
    """None if the plan selects nothing by score."""
    if plan.keep is None or plan.keep.select is None:
        return None
    rule = _digest(_fields(plan.keep.select, LATER))
    held = {"keep": _fields(plan.keep, ("select",)), "store": plan.store, "read": plan.read}
    return Names(rule, rule + _digest(held))


def _fields(record: Select | Keep, but: tuple[str, ...]) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record) if field.name not in but}


def _digest(values: dict[str, Any]) -> str:
    tensors: records.Tensors = {}
    document = records.dump(values, "", tensors)
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    arrays = [tensors[name].flatten().cpu() for name in sorted(tensors)]
    return digest(dumps([document, shapes], sort_keys=True), *arrays)


@dataclass(frozen=True)
class Made:
    """`seconds`: what it took, without its `parts`, which are in the memo too."""

    value: tuple[torch.Tensor, ...]
    seconds: float
    parts: tuple[Key, ...]


class Memo:
    """Of one prompt's prefill, of one row."""

    def __init__(self) -> None:
        self.made: dict[Key, Made] = {}

    def account(self, names: Names | None) -> Account | None:
        """For a cache of the plan that is `named` so."""
        return None if names is None else Account(self.made, names)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for made in self.made.values() for tensor in made.value)


@dataclass
class _Making:
    """`parts` that were asked for meanwhile, and the seconds that went into making them."""

    parts: list[Key] = field(default_factory=list)
    seconds: float = 0.0


class Account:
    """`spared`: seconds that the cache would have spent alone, and did not."""

    def __init__(self, made: dict[Key, Made], names: Names):
        self.made, self.names, self.spared = made, names, 0.0
        self._met: set[Key] = set()
        self._making: list[_Making] = []

    def score(self, layer: int, heads: list[int], make: Score) -> torch.Tensor:
        """The rule's scores of the entries of these heads."""
        (found,) = self._once(("score", self.names.rule, layer, *heads), lambda: (make(),))
        return found

    def paid(self, spec: Select, queries: int, layer: int, heads: list[int], make: Score) -> torch.Tensor:
        """What so many observed queries pay these heads' entries."""
        key = ("paid", *(getattr(spec, name) for name in PAID), queries, layer, *heads)
        (found,) = self._once(key, lambda: (make(),))
        return found

    def passed(self, lanes: list[tuple[int, ...]], told: torch.Tensor | None, make: Make) -> tuple[torch.Tensor, ...]:
        """Scores by passes through a cache, of the layer and heads of each of its lanes; `told` is what was fed."""
        words = () if told is None else tuple(told.flatten().tolist())
        return self._once(("passed", self.names.plan, *lanes, words), make)

    def _once(self, key: Key, make: Make) -> tuple[torch.Tensor, ...]:
        """What was made under this key, or is now: copies, which the caller may change."""
        if self._making:
            self._making[-1].parts.append(key)
        if key in self.made:
            self._spare(key)
        else:
            self._make(key, make)
        return tuple(tensor.clone() for tensor in self.made[key].value)

    def _make(self, key: Key, make: Make) -> None:
        making, start = _Making(), _now()
        self._making.append(making)
        try:
            value = make()
        finally:
            self._making.pop()
        seconds = _now() - start
        if self._making:
            self._making[-1].seconds += seconds
        self.made[key] = Made(value, seconds - making.seconds, tuple(making.parts))
        self._met.add(key)

    def _spare(self, key: Key) -> None:
        """Count what was handed out, and its parts, unless this cache has them already."""
        if key not in self._met:
            self._met.add(key)
            self.spared += self.made[key].seconds
            for part in self.made[key].parts:
                self._spare(part)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
