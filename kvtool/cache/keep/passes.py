"""Queries that score a prompt's entries in a pass of their own, once the prompt is in.

    run the network over some tokens, after all that is held;
    s_j = the rule's score of entry j of a span, by the queries of that pass

A pass is on trial: nothing of it is kept. Its queries are scored against the span's entries and those of the pass
itself, causally; the other entries take part in the pass, not in the score, but for the `Select.sink` first ones. Every
entry is scored once, in order. Parts of the batch go one after another.

`rebuild.py` feeds the prompt again, a span at a time. `answer` feeds what will follow the prompt, which a caller knows
who measures on prompts whose answers are known (observe "answer"): what such queries score is what an eviction would
keep that knew the future. The span is then the whole prompt, and nobody who generates can have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.part import Part
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.errors import InputError
from kvtool.serving import Attention, Layer, served

Span = tuple[int, int]


def answer(network: Any, layers: list[SegmentLayer], tokens: torch.Tensor | None) -> None:
    """Let what follows the prompt, int64 [B,A], score what every selection holds that is still to come."""
    if tokens is None:
        raise InputError(
            "the plan keeps what the answer's own queries look at, and nobody said what the answer is",
            remedy="replay or compare it: their tasks know what follows a prompt",
        )
    for number, part, _ in waiting(layers):
        run(network, layers, number, [((0, part.fed), tokens[part.rows])])


def waiting(layers: list[SegmentLayer]) -> Iterator[tuple[int, Part, Thinned]]:
    """The parts of the batch that a selection is still to thin: their numbers, and one of the lanes that it thins."""
    for number, part in enumerate(layers[0].parts):
        lanes = (lane for layer in layers for lane in layer.parts[number].lanes if isinstance(lane, Thinned))
        first = next(lanes, None)
        if first is not None:
            yield number, part, first


def run(network: Any, layers: list[SegmentLayer], number: int, fed: Iterable[tuple[Span, torch.Tensor]]) -> None:
    """One pass of part `number` for each of `fed`: whose entries it scores, first and last + 1, and ids int64 [B,T]."""
    passes = [_Pass(layer, number) for layer in layers]
    part = layers[0].parts[number]
    with served(network), torch.no_grad():
        for span, ids in fed:
            for each in passes:
                each.span = span
            places = torch.arange(part.fed, part.fed + ids.shape[1], device=ids.device) + part.origin
            network.base_model(
                input_ids=ids, position_ids=places.expand_as(ids), past_key_values=Cache(layers=list(passes)),
                use_cache=True,
            )  # fmt: skip


class _Pass(Layer):
    """One layer of one part during a pass, whose entries in `span` are scored."""

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
