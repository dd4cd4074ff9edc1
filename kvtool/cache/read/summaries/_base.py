"""What a summary is given. A summary is a file with

    summarise(k, given) → parts        keys of whole units, [B,K,U,unit,D] → tensors with units on axis 2
    score(q, parts, given) → scores    q [B,K,G,D] → [B,K,G,U], fp32 at least, higher for units worth reading

and, where they apply, `pooled(mean, size)`: the parts of units of unequal sizes, from their mean keys [B,K,U,D] and
sizes [B,K,U]; `squares(parts)`: the squared length of the one vector that stands for each unit, [B,K,U], where one
does; LOGIT: is the score that of an entry, so that it can stand for the unit in a softmax; CREDITS, if it goes by what
entries were attended while they were recent; and
`share(given, width, group)`, for a summary that holds nothing and looks at the keys themselves: what share of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtool_kernels.precision import wide

Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Given:
    """Of a plan, for the KV heads of a lane: `table` [K,...], `rank` and `bits`, as in `Read`. Of the entries that are
    summarised: their `credit` [B,K,U,unit], where it is known (`cache/read/credits.py`)."""

    table: torch.Tensor | None = None
    rank: int = 0
    bits: int = 0
    credit: torch.Tensor | None = None


def best(q: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The largest product with q [B,K,G,r] among the entries of each unit, labels [B,K,U,unit,r] → [B,K,G,U]."""
    units, unit = labels.shape[2:4]
    return (wide(q) @ wide(labels.flatten(2, 3)).transpose(-1, -2)).unflatten(3, (units, unit)).amax(-1)
