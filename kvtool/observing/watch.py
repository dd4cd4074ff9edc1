"""Who observes one sample: its listeners, each with a clock on it, and the file of raw tensors."""

from __future__ import annotations

import time
from typing import Any

from kvtool.corpus.base import Sample
from kvtool.raw import Raw
from kvtool.statistics._base import Statistic


class Watch:
    """The listeners of one sample, with a clock on each."""

    def __init__(
        self, sample: Sample, listeners: dict[str, Statistic], costs: dict[str, float], raw: Raw | None, weight: str
    ):
        self.sample, self.listeners, self.costs, self.raw, self.weight = sample, listeners, costs, raw, weight

    def wants(self, what: str) -> bool:
        return (what == "states" and self.raw is not None) or any(
            stat.observes(what) for stat in self.listeners.values()
        )

    def cells(self) -> int:
        return max((getattr(stat, "cells", 1) for stat in self.listeners.values()), default=1)

    def all(self, what: str, *views: Any) -> None:
        for name, stat in self.listeners.items():
            if stat.observes(what):
                with self.clock(name):
                    getattr(stat, what)(*views)
        if what == "states" and self.raw is not None:
            with self.clock("(raw)"):
                self.raw.states(*views)

    def clock(self, name: str) -> _Clock:
        return _Clock(self.costs, name)


class _Clock:
    def __init__(self, costs: dict[str, float], name: str):
        self.costs, self.name = costs, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.costs[self.name] = self.costs.get(self.name, 0.0) + time.perf_counter() - self.start
