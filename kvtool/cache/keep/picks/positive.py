"""Every entry whose score is above 0, however many there are; of heads that go by the same scores."""

from __future__ import annotations

import torch

from kvtool.cache.keep.picks._base import Choice

RAGGED = True


def pick(choice: Choice) -> torch.Tensor:
    stays = choice.scores[0, 0] > 0
    stays[: choice.free.start] = stays[choice.free.stop :] = True
    return stays.nonzero().flatten().expand(*choice.scores.shape[:2], -1)
