"""Attention probability times the size of the value: attention to a value near zero moves nothing.

    s_j = reduce_i p_ij · ‖v_j‖₁      (VATP: Guo et al., arXiv 2406.12335)

The norm is of the value as cached, before the output projection. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View, reduced, visible
from kvtool_kernels.precision import wide

SEES = "queries"


def score(view: View) -> torch.Tensor:
    size = wide(view.v).abs().sum(-1).repeat_interleave(view.group, 1)[:, :, None]
    return reduced(view, (p * size[..., : p.shape[-1]] for _, p in visible(view)))
