"""A share of the places goes to the latest entries, the rest to those that score best.

    of `count` places [settings["newest"] · count] hold the newest entries      (D2O: arXiv 2406.13035)

So where layers have different budgets, their windows differ in proportion.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice
from kvtool.slots import Select

RAGGED = False


def pick(choice: Choice) -> torch.Tensor:
    where = among(choice.view.spec, choice.scores.shape[2], choice.count, choice.free)
    return _base.best(choice.scores, choice.count, where)


def among(spec: Select, held: int, count: int, free: slice) -> slice:
    """The free entries, of so many held, that are not the latest."""
    stop = min(free.stop, held - round(float(spec.settings["newest"]) * count))
    return slice(free.start, max(free.start, stop))
