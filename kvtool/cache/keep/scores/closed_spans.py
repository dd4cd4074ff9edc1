"""0 for entries in spans of the text that are over, the newest few apart; 1 for all others.

A span runs from an opening to a closing marker; one in another is part of it (see `cache/keep/spans.py`). Settings:
"opening" and "closing", a marker's spellings in token ids; "buffer", the newest closed spans that are spared;
"markers", whether markers are 0 too; then a span is not over until something follows it, since the newest entry always
stays. What is held says what the spans are, so one whose marker is gone is none. [B,K,S] fp32.
"""

from __future__ import annotations

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.spans import inside, numbered
from kvtool.slots import Select

SEES = "entries"
NEEDS = ("tokens",)


def quiet(spec: Select, tokens: torch.Tensor) -> bool:
    """Nothing is over that was not before the newest of the tokens [B,K,S] held: no marker ends there, or just before,
    where what follows a marker ends its span."""
    markers = [list(ids) for name in ("opening", "closing") for ids in spec.settings[name]]
    near = tokens[:, :, -1 - max(map(len, markers), default=0) :].flatten(0, 1).tolist()
    return not any(ids in (line[-len(ids) :], line[-1 - len(ids) : -1]) for line in near for ids in markers)


def score(view: View) -> torch.Tensor:
    settings, tokens = view.spec.settings, view.tags["tokens"]
    pair = settings["opening"], settings["closing"]
    number = numbered(tokens, *pair, unclosed=False)
    over = (number > 0) & (number <= number.amax(-1, keepdim=True) - int(settings["buffer"]))
    over &= (number != number[..., -1:]) if settings["markers"] else inside(tokens, *pair, markers=False)
    return (~over).float()
