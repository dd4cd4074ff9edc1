"""What stands before a cache's own tokens and is held by other caches: a shared prefix, and documents read after it.

    o_x, l_x = merge of the cache's own attention and the prefix's            logits as they are
    o_c, l_c = merge of attention over every document, not causal             logits / T
    weights  = softmax([S · T · l_c, l_x])                                    l: log-sum-exp of the logits

(APE: Yang et al., arXiv 2502.05431.) With T = S = 1 that is attention to all entries at once. T < 1 sharpens attention
within the documents, and T · l_c goes from their log-sum-exp towards their largest logit; S < 1 makes all of them count
for less against the text. Every document is a cache of its own: it has its plan, its encodings, its windows.

A document may stand elsewhere than where it was read: keys that should be turned by +o stay as they are, codes or not,
and the query is turned by −o for them. RoPE sees differences of positions only, so that both are the same.

Shapes: B batch, H query heads, T tokens, D head dim. Every row of a batch has the same documents.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import torch

from kvtool.cache.lane import Lane, Partial, Step
from kvtool.rotary import Rotary
from kvtool_kernels.ops import merge

if TYPE_CHECKING:
    from kvtool.cache.segment_cache import SegmentCache
    from kvtool.cache.segment_layer import SegmentLayer


@dataclass(frozen=True)
class Context:
    """One layer of `cache`, which is read and not written to, and lives as long as this does. Its first token stands at
    position `first`, `offset` later than where the model read it, and `rotary` turns queries."""

    cache: SegmentCache
    layer: SegmentLayer
    first: int
    rotary: Rotary
    offset: int = 0

    def attend(self, q: torch.Tensor, places: torch.Tensor, scale: float, softcap: float | None) -> Partial:
        """q [1,H,T,D] of tokens at `places` int64 [T], all of which stand after the context."""
        if self.offset:
            zero = torch.zeros(1, 1, dtype=torch.long, device=q.device)
            q = self.rotary.move(q, zero + self.offset, zero)
        part = self.layer.parts[0]
        out = part.over(q, places - self.first, Step(part.fed, scale, softcap, origin=part.origin))
        self.layer.done()
        return out

    def aside(self) -> Context:
        """The same for one more cache, whose queries leave no trace for others."""
        layer, part = copy.copy(self.layer), copy.copy(self.layer.parts[0])
        part.lanes, layer.parts = [lane.aside() for lane in part.lanes], [part]
        return replace(self, layer=layer)


class Contexts:
    """One layer's. `start`: the position of the cache's own first token. temperature, scale: T and S."""

    def __init__(
        self,
        start: int,
        prefix: Context | None,
        documents: Sequence[Context] = (),
        temperature: float = 1.0,
        scale: float = 1.0,
    ):
        self.start, self.prefix, self.documents = start, prefix, tuple(each.aside() for each in documents)
        self.temperature, self.scale = temperature, scale

    def beside(self, q: torch.Tensor, own: Partial, start: int, scale: float, softcap: float | None) -> Partial:
        """`own`, the attention of q [B,H,T,D] to the cache's own entries, merged with attention to all that stands
        before them. `start`: the cache's own tokens before the first query."""
        batch, heads, tokens, width = q.shape
        places = torch.arange(tokens, device=q.device).repeat(batch) + self.start + start
        rows = q.transpose(0, 1).reshape(1, heads, batch * tokens, width)
        held: list[Partial] = []
        if self.prefix is not None:
            held.append(self.prefix.attend(rows, places, scale, softcap))
        if self.documents:
            t = self.temperature
            cap = None if softcap is None else softcap / t
            out, lse = reduce(merge, (each.attend(rows, places, scale / t, cap) for each in self.documents))
            held.append((out, self.scale * t * lse))
        for out, lse in held:
            out = out.reshape(heads, batch, tokens, -1).transpose(0, 1)
            own = merge(own, (out, lse.reshape(heads, batch, tokens).transpose(0, 1)))
        return own

    def aside(self) -> Contexts:
        """The same for one more cache."""
        return Contexts(self.start, self.prefix, self.documents, self.temperature, self.scale)

    def lanes(self) -> Iterator[Lane]:
        """All lanes of all contexts."""
        for context in (self.prefix, *self.documents):
            if context is not None:
                yield from context.layer.lanes()
