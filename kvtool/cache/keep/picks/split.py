"""A share of the places goes to the latest entries, the rest to those that score best.

    of `count` places [settings["newest"] · count] hold the newest entries      (D2O: arXiv 2406.13035)

So where layers have different budgets, their windows differ in proportion.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice

RAGGED = False


def pick(choice: Choice) -> torch.Tensor:
    newest = round(float(choice.view.spec.settings["newest"]) * choice.count)
    stop = min(choice.free.stop, choice.scores.shape[2] - newest)
    return _base.best(choice.scores, choice.count, slice(choice.free.start, max(choice.free.start, stop)))
