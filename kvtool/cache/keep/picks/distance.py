"""The best of a prompt; at decode steps, what stands `settings["distance"]` places before the newest entry goes, or
what has just left the recent entries that always stay, if there are more of those.

So the first entries stay, then come the latest: Elastic Cache (Liu et al., arXiv 2407.18121), PrefixKV (Wang et al.,
arXiv 2412.03409).
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import _base
from kvtool.cache.keep.picks._base import Choice

RAGGED = False
BLIND = True


def pick(choice: Choice) -> torch.Tensor:
    if not choice.view.turn:
        return _base.best(choice.scores, choice.count, choice.free)
    held = choice.scores.shape[2]
    last = max(choice.free.start, min(held - choice.view.spec.settings["distance"], choice.free.stop))
    first = max(choice.free.start, last - (held - choice.count))
    stays = torch.ones(held, dtype=torch.bool, device=choice.scores.device)
    stays[first : first + held - choice.count] = False
    return stays.nonzero().flatten().expand(*choice.scores.shape[:2], -1)
