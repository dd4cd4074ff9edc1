"""The entries that score best for each of the observed queries that could see them; ties go to the newer one.

    ã_j = s_j / #{observed queries i: i ≥ j}      (ZipVL: He et al., arXiv 2410.08584, after ZipCache, arXiv 2405.14256)

For scores that are sums over queries, where how many stay goes by the sums.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice

RAGGED = False


def pick(choice: Choice) -> torch.Tensor:
    rows = choice.view.rows
    columns = torch.arange(choice.scores.shape[2], device=rows.device)
    seen = (len(rows) - torch.searchsorted(rows, columns)).clamp_min(1)
    return _base.best(choice.scores / seen.to(choice.scores), choice.count, choice.free)
