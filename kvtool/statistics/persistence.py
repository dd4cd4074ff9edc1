"""Whether entries that were important go on to be the ones that are: persistence of importance, per query head.

    before_j = some query i of the first half of a text pays entry j more than 1/t_i,   t_i entries seen by i
    after_j  = some query of the second half does;   j of the first half
    persistence = |before ∩ after| / |after|                      (Scissorhands: Liu et al., arXiv 2305.17118)

`both`, `after` and `before` count entries; a head in which all entries were important before persists by necessity.
Layers with a sliding window of their own are left out. It knows nothing of how often or how much an entry is attended.
"""

from __future__ import annotations

import torch

from kvtool.statistics._base import States, Statistic

BLOCK = 64  # rows at a time


class Persistence(Statistic):
    default = False

    def zero(self) -> None:
        for name in ("both", "after", "before"):
            self.add(name, self.geometry.layers, self.geometry.query_heads)
        self.add("entries", 1)

    def states(self, view: States) -> None:
        half = view.k.shape[1] // 2
        if view.layer == 0:
            self["entries"] += half
        if self.geometry.windows[view.layer] is not None:
            return
        before = important(view, 0, half)
        after = important(view, half, view.k.shape[1])
        for name, entries in (("both", before & after), ("after", after), ("before", before)):
            self[name][view.layer] += entries.sum(1)


def important(view: States, first: int, end: int) -> torch.Tensor:
    """Does any query from `first` to before `end` pay an entry of the text's first half more than its even share? bool
    [H,T/2]."""
    found = torch.zeros(len(view.q), view.k.shape[1] // 2, dtype=torch.bool, device=view.k.device)
    for low in range(first, end, BLOCK):
        high = min(low + BLOCK, end)
        rows = torch.arange(low, high, device=view.k.device)
        logits = view.logits(low, high, high).flatten(0, 1)
        columns = torch.arange(logits.shape[-1], device=view.k.device)
        logits = logits.masked_fill(columns > rows[:, None], float("-inf"))
        total = logits.logsumexp(-1)
        if view.sink_logits is not None:
            total = torch.logaddexp(total, view.sink_logits.float()[:, None])
        above = (logits > (total - (rows + 1).log())[..., None]).any(1)[:, : found.shape[1]]
        found[:, : above.shape[1]] |= above
    return found
