"""The best of a prompt; at decode steps, what stands `settings["distance"]` places before the newest entry goes, or
what has just left the recent entries that always stay, if there are more of those.

So the first entries stay, then come the latest: Elastic Cache (Liu et al., arXiv 2407.18121), PrefixKV (Wang et al.,
arXiv 2412.03409).
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice
from kvtool.slots import Select

RAGGED = False
BLIND = True


def pick(choice: Choice) -> torch.Tensor:
    if not choice.view.turn:
        return _base.best(choice.scores, choice.count, choice.free)
    held = choice.scores.shape[2]
    first = gap(choice.view.spec, held, choice.count, choice.free)
    stays = torch.ones(held, dtype=torch.bool, device=choice.scores.device)
    stays[first : first + held - choice.count] = False
    return stays.nonzero().flatten().expand(*choice.scores.shape[:2], -1)


def gap(spec: Select, held: int, count: int, free: slice) -> int:
    """The first of the entries, of so many held, that leave at a decode step."""
    last = max(free.start, min(held - spec.settings["distance"], free.stop))
    return max(free.start, last - (held - count))
