"""Tokens behind what was dropped, fed again, as if it had never been there (`Keep.position` "reencode").

    entries held [ sound: before the first that was dropped | stale: behind it ], at positions that have closed up
    run the network over the stale entries' tokens, at these positions, over the sound entries and one another;
    the keys and values of that pass take the place of the old ones, layer by layer

What is held then is what a prompt of the tokens held would have left, up to the position of its first, which RoPE does
not see. A pass over m tokens costs a prefill of them, and no memory beside its own activations. The entries are as many
as before. Every head of every layer must hold the same tokens. Parts of the batch go one after another.

(After TIM's runtime, arXiv 2507.16784, as described in the card of `span-rule`.)
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.errors import InputError
from kvtool.serving import Attention, Layer, served


def feed_again(network: Any, layers: list[SegmentLayer]) -> int:
    """Make every entry sound; how many tokens that took, in all rows."""
    return sum(_renew(network, layers, number) for number in range(len(layers[0].parts)))


def _renew(network: Any, layers: list[SegmentLayer], number: int) -> int:
    lanes = [lane for layer in layers for lane in layer.parts[number].lanes if isinstance(lane, Thinned)]
    sound = [lane.sound for lane in lanes if lane.sound is not None]
    if not sound:
        return 0
    part, held = layers[0].parts[number], lanes[0].tokens
    assert held is not None
    ids = held[:, 0, min(sound) :]
    if any(lane.tokens is None or not _alike(lane.tokens, held[:, :1]) for lane in lanes):
        raise InputError(
            "tokens are fed again where every head holds the same of them, and the plan's score tells heads apart",
            remedy="use position=reindex",
        )
    places = torch.arange(part.fed - ids.shape[1], part.fed, device=ids.device) + part.origin
    with served(network), torch.no_grad():
        network.base_model(
            input_ids=ids, position_ids=places.expand_as(ids),
            past_key_values=Cache(layers=[_Again(layer, number) for layer in layers]), use_cache=True,
        )  # fmt: skip
    for lane in lanes:
        lane.sound = None
    return ids.numel()


def _alike(tokens: torch.Tensor, first: torch.Tensor) -> bool:
    """Do all heads of [B,K,N] hold what first [B,1,N] says?"""
    return tokens.shape[2] == first.shape[2] and bool((tokens == first).all())


class _Again(Layer):
    """One layer of one part, whose newest entries are fed again."""

    def __init__(self, held: SegmentLayer, number: int):
        super().__init__()
        self.held, self.number = held, number

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        return self.held.renew(q, k, v, call, self.number)

    def get_seq_length(self) -> int:
        return self.held.parts[self.number].fed
