"""Queries that score what is held in a pass of their own: which pass that is, and whose scores it gives.

The passes themselves are in `passes.py`. Caches that adopted the same prefill under plans that differ in what comes
after scores have the same passes before them, and one's scores are handed to the others (`memo.py`): these depend on
all that the queries of a pass attend to, which is the whole plan but what `LATER` names, on how heads share lanes, and
on the tokens that are fed.
"""

from __future__ import annotations

from typing import Any

import torch

from kvtool.cache.keep.memo import Account
from kvtool.cache.keep.passes import answer
from kvtool.cache.keep.rebuild import rebuild
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.slots import Select


def look_again(
    spec: Select, network: Any, layers: list[SegmentLayer], told: torch.Tensor | None, account: Account | None = None
) -> None:
    """Let the selection's queries score the prompt that is in, if they come in a pass of their own. told int64 [B,A]:
    what follows the prompt, for plans that keep what it looks at."""
    if not spec.on_trial:
        return
    selectors = [lane.selector for layer in layers for lane in layer.lanes() if isinstance(lane, Thinned)]

    def scores() -> tuple[torch.Tensor, ...]:
        if spec.observe == "rebuild":
            rebuild(network, layers)
        else:
            answer(network, layers, told)
        return tuple(selector.running for selector in selectors if selector.running is not None)

    if account is None:
        scores()
        return
    lanes = [(selector.layer, *selector.heads) for selector in selectors]
    found = account.passed(lanes, told if spec.observe == "answer" else None, scores)
    for selector, running in zip(selectors, found, strict=True):
        selector.running = running
