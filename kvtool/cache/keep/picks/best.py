"""The entries that score best; ties go to the newer one."""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice
from kvtool.slots import Select

RAGGED = False


def pick(choice: Choice) -> torch.Tensor:
    return _base.best(choice.scores, choice.count, choice.free)


def among(spec: Select, held: int, count: int, free: slice) -> slice:
    """Of the one that leaves: any that is free."""
    return free
