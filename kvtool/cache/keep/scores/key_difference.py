"""How little the key resembles the mean direction of all keys: the unlike ones are kept.

    s_j = −cos(k_j, mean_i k_i / ‖k_i‖)      (KeyDiff: Park et al., arXiv 2504.15364)

[B,K,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool_kernels.precision import wide

SEES = "entries"


def score(view: View) -> torch.Tensor:
    keys = wide(view.k)
    mean = torch.nn.functional.normalize(keys, dim=-1).mean(2, keepdim=True)
    return -torch.nn.functional.cosine_similarity(keys, mean, dim=-1)
