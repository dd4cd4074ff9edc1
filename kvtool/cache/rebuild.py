"""A prompt that the model writes down again: what it looks at meanwhile is what it needs to know the prompt.

    for each chunk of the prompt's tokens:  run the network over [instruction | chunk] after all that is held
    s_j = the rule's score of the chunk's entry j, by all queries of that pass      (observe "rebuild")

(KVzip: Kim et al., arXiv 2505.23416.) The pass is on trial: nothing of it is kept. Its queries are scored against the
`Select.sink` first entries, the chunk's own entries and those of the pass itself, causally; the other chunks' entries
take part in the pass, not in the score. So a pass of m tokens costs m·n for attention over the n entries held and m·m
for the score, and no n×n matrix is held. Every entry is scored once, in order.

`Select.settings`: "chunk", tokens of a pass; token ids "instruction" of the first pass and "onward" of the others,
which the last `OVERLAP` tokens of the chunk before follow; "opening", the ids after either. The prompt's own ids are
those that lanes remember. Parts of the batch go one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool.cache.scores._base import View
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.cache.thinned import Thinned
from kvtool.serving import Attention, Layer, served
from kvtool.slots import Select

OVERLAP = 8  # tokens that say where a later chunk begins
Span = tuple[int, int]


def rebuild(network: Any, layers: list[SegmentLayer]) -> None:
    """Score what every selection that is still to come holds, in all layers and parts of the batch."""
    with served(network), torch.no_grad():
        for number in range(len(layers[0].parts)):
            passes = [_Pass(layer, number) for layer in layers]
            first = next((lane for each in passes for lane in each.lanes), None)
            if first is None or first.tokens is None or first.selector is None:
                continue
            part = layers[0].parts[number]
            for span, ids in _chunks(first.selector.spec, first.tokens[:, 0]):
                for each in passes:
                    each.span = span
                places = torch.arange(part.fed, part.fed + ids.shape[1], device=ids.device) + part.origin
                network.base_model(
                    input_ids=ids, position_ids=places.expand_as(ids), past_key_values=Cache(layers=list(passes)),
                    use_cache=True,
                )  # fmt: skip


def _chunks(spec: Select, tokens: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
    """tokens int64 [B,n] → (first, last + 1) of each chunk, and what is fed for it, [B,T]."""

    def told(name: str) -> torch.Tensor:
        return torch.tensor(list(spec.settings[name]), dtype=torch.long, device=tokens.device).expand(len(tokens), -1)

    for low in range(0, tokens.shape[1], int(spec.settings["chunk"])):
        high = min(low + int(spec.settings["chunk"]), tokens.shape[1])
        asked = [told("onward"), tokens[:, max(0, low - OVERLAP) : low]] if low else [told("instruction")]
        yield (low, high), torch.cat([*asked, told("opening"), tokens[:, low:high]], dim=1)


class _Pass(Layer):
    """One layer of one part during a pass, whose chunk is `span`."""

    def __init__(self, held: SegmentLayer, number: int):
        super().__init__()
        self.held, self.number, self.span = held, number, (0, 0)
        self.part = held.parts[number]
        self.lanes = [lane for lane in self.part.lanes if isinstance(lane, Thinned)]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        grouped = q.unflatten(1, (k.shape[1], -1))
        for lane in self.lanes:
            _score(lane, grouped[:, lane.heads].flatten(1, 2), (k[:, lane.heads], v[:, lane.heads]), self.span, call)
        return self.held.trial(q, k, v, call, self.number)

    def get_seq_length(self) -> int:
        return self.part.fed


def _score(lane: Thinned, q: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], span: Span, call: Attention) -> None:
    """Queries q [B,H,T,D] of the lane's heads, with keys and values of their own, score the lane's entries `span`."""
    assert lane.selector is not None
    low, high = span
    sinks = min(lane.selector.spec.sink, low)
    held_k, held_v, _ = lane.recall()
    k, v = (
        torch.cat([held[:, :, :sinks], held[:, :, low:high], new], dim=2)
        for held, new in zip((held_k, held_v), own, strict=True)
    )
    first = sinks + high - low
    rows = torch.arange(first, first + q.shape[2], device=q.device)
    view = View(q, rows, k, v, call.scale, call.softcap, lane.selector.spec, lane.selector.layer, lane.heads)
    lane.selector.credit(view, slice(sinks, first))
