"""Several caches in one pass of the network: every token of every cache's rows goes through the linear layers at once.

    logits = feed(model, caches, pieces)

Piece i, int64 [B_i,T_i], goes on from what cache i holds, at positions of its own; lengths and plans may differ. Each
cache attends for its own tokens, as if it were fed alone.

Where caches branch from one another's prefix, several hold the same entries (`shared.py`). With one token a row, the
queries of all rows below a prefix become rows of one product over it (Hydragen: Juravsky et al., arXiv 2402.05099):

    level i: s_i shared prefixes, each attended once by all rows below it;  out = merge over levels and the row's own

so that a step reads Σ_i (entries of level i) + Σ (own entries), whatever the number of rows. Suffixes continue after
their own branch, however long that is.

Shapes: B_i rows of cache i, H query heads, T_i tokens, D head dim, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Lane, Partial, Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.cache.share.shared import Shared
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.packing import Packed, Row, run
from kvtool.serving import Attention


def feed(model: Model, caches: Sequence[SegmentCache], pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Feed pieces int64 [B_i,T_i] to their caches; the logits [B_i,V] after each row's last token."""
    for cache in caches:
        if cache.network is not model.network:
            raise InputError("a cache of another model")
    row = Row([piece.to(model.device) for piece in pieces], [cache.segments[0].place for cache in caches])
    layers = [_Together(row, [cache.segments[index] for cache in caches]) for index in range(model.geometry.layers)]
    with model.served(), torch.no_grad():
        logits = run(model.network, row, layers, logits_to_keep=row.last).logits[0]
    return list(logits.split([len(piece) for piece in pieces]))


def held(caches: Sequence[SegmentCache]) -> int:
    """Bytes that these caches hold, what they share once."""
    buffers = (buffer for cache in caches for buffer in cache.buffers())
    return sum({id(buffer): buffer.nbytes for buffer in buffers}.values())


class _Together(Packed):
    """One layer of a pass over several caches."""

    def __init__(self, row: Row, layers: Sequence[SegmentLayer]):
        super().__init__(row, layers)
        self.layers = layers

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        if all(tokens == 1 for _, tokens in self.row.shapes):
            call = replace(call, given=_given(self.layers, self.row.heads(q), Step(0, call.scale, call.softcap)))
        return super().attend(q, k, v, call)


def _given(layers: Sequence[SegmentLayer], queries: Sequence[torch.Tensor], step: Step) -> dict[Shared, Partial]:
    """Attention over what several caches hold, for each of them; queries [B_i,H,1,D]."""
    found: dict[tuple[int, ...], list[tuple[Shared, torch.Tensor]]] = {}
    for layer, q in zip(layers, queries, strict=True):
        for lane in layer.lanes():
            mine = None
            for shared in lane.shared if isinstance(lane, Bulk) else ():
                mine = _of(lane, q, layer) if mine is None else mine
                found.setdefault(shared.key, []).append((shared, mine))
    given: dict[Shared, Partial] = {}
    for members in found.values():
        if len(members) > 1 and not members[0][0].placed:
            every = torch.cat([q for _, q in members])
            parts = zip(
                *(x.split([len(q) for _, q in members]) for x in members[0][0].attend(every, step)), strict=True
            )
            given |= dict(zip((shared for shared, _ in members), parts, strict=True))
    return given


def _of(lane: Lane, q: torch.Tensor, layer: SegmentLayer) -> torch.Tensor:
    """The queries of a lane's heads."""
    kv_heads = sum(len(other.heads) for other in layer.parts[0].lanes)
    return q if len(lane.heads) == kv_heads else q.unflatten(1, (kv_heads, -1))[:, lane.at].flatten(1, 2)
