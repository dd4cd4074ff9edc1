"""A prompt that the model writes down again: what it looks at meanwhile is what it needs to know the prompt.

    for each chunk of the prompt's tokens:  run the network over [instruction | chunk] after all that is held
    s_j = the rule's score of the chunk's entry j, by all queries of that pass      (observe "rebuild")

(KVzip: Kim et al., arXiv 2505.23416.) A pass (`passes.py`) of m tokens costs m·n for attention over the n entries held
and m·m for the score, and no n×n matrix is held.

`Select.settings`: "chunk", tokens of a pass; token ids "instruction" of the first pass and "onward" of the others,
which the last `OVERLAP` tokens of the chunk before follow; "opening", the ids after either. The prompt's own ids are
those that lanes remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvtool.cache.keep import passes
from kvtool.cache.keep.passes import Span
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.slots import Select

OVERLAP = 8  # tokens that say where a later chunk begins


def rebuild(network: Any, layers: list[SegmentLayer]) -> None:
    """Score what every selection that is still to come holds, in all layers and parts of the batch."""
    for number, _, lane in passes.waiting(layers):
        if lane.tokens is not None:
            passes.run(network, layers, number, _chunks(lane.selector.spec, lane.tokens[:, 0]))


def _chunks(spec: Select, tokens: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
    """tokens int64 [B,n] → (first, last + 1) of each chunk, and what is fed for it, [B,T]."""

    def told(name: str) -> torch.Tensor:
        return torch.tensor(list(spec.settings[name]), dtype=torch.long, device=tokens.device).expand(len(tokens), -1)

    for low in range(0, tokens.shape[1], int(spec.settings["chunk"])):
        high = min(low + int(spec.settings["chunk"]), tokens.shape[1])
        asked = [told("onward"), tokens[:, max(0, low - OVERLAP) : low]] if low else [told("instruction")]
        yield (low, high), torch.cat([*asked, told("opening"), tokens[:, low:high]], dim=1)
