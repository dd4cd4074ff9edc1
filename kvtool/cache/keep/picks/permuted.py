"""What the released code of Elastic Cache keeps of a prompt: it takes the order of scores for their ranks.

    of the m entries that may leave, entry i stays if argsort(s)_i > f;   f entries are to leave

argsort(s)_i is the number of the entry with the i-th smallest score, not the place of entry i among the scores, so what
stays has little to do with its own score. m − f − 1 entries stay, one fewer than asked for. At decode steps as
`distance` (liuzuyan/ElasticCache, kv_cache.py, commit 3138e03). Equal scores stand in order of place.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks import distance
from kvtool.cache.keep.picks._base import Choice
from kvtool.cache.keep.picks.distance import gap as gap

RAGGED = False
BLIND = True


def pick(choice: Choice) -> torch.Tensor:
    if choice.view.turn:
        return distance.pick(choice)
    held = choice.scores.shape[2]
    stays = torch.ones_like(choice.scores, dtype=torch.bool)
    stays[..., choice.free] = choice.scores[..., choice.free].argsort(dim=-1, stable=True) > held - choice.count
    return stays.nonzero()[:, 2].reshape(*stays.shape[:2], -1)
