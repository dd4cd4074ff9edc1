"""Entries outside of marked spans come before those inside; among either, attention probability decides.

    s_j = a_j / max_j a + 2 · [j lies outside],   a_j = reduce_i p_ij      (LOOK-M: Wan et al., arXiv 2406.18139)

Spans lie between the markers `settings["open"]` and `settings["close"]`, each a list of spellings in token ids (see
`cache/keep/spans.py`); the markers themselves are outside. The released code adds −65516 to what is inside, which in 16
bits leaves no room for differences among scores; the offset here ranks alike and keeps them. [B,H,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.spans import inside

SEES = "queries"
NEEDS = ("tokens",)


def score(view: View) -> torch.Tensor:
    paid = view.paid / view.paid.amax(-1, keepdim=True).clamp_min(1e-30)
    return paid + 2.0 * (~spans(view)).repeat_interleave(view.group, 1)


def spans(view: View) -> torch.Tensor:
    """bool [B,K,S]: which entries lie inside a span."""
    settings = view.spec.settings
    return inside(view.tags["tokens"], settings["open"], settings["close"], markers=False)
