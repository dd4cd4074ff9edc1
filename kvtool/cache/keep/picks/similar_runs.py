"""As `runs`, with an ε known beforehand: links above it hold, even where fewer runs remain than entries may stay.

`tables["epsilon"]` fp32 [L,K]. The number of entries that stay is an upper bound, met by a lower ε where it must be.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks._base import Choice
from kvtool.cache.keep.picks.runs import picked

RAGGED = True


def pick(choice: Choice) -> torch.Tensor:
    return picked(choice, choice.view.table("epsilon")[choice.view.heads])
