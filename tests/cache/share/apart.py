"""Three documents that were read apart after one prefix, and a question."""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import after, beside, read
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Position
from tests.models import random_ids
from tests.running import feed

PREFIX, DOCUMENTS, QUESTION = random_ids(1, 5, seed=1)[0], (7, 12, 4), random_ids(1, 6, seed=2)
TEXTS = [random_ids(1, count, seed=10 + count)[0] for count in DOCUMENTS]


def prefixed(model: Model, ids: torch.Tensor = PREFIX) -> SegmentCache | None:
    return read(model, SegmentCache(model), ids) if len(ids) else None


def document(model: Model, prefix: SegmentCache | None, ids: torch.Tensor, plan: Plan | None = None) -> SegmentCache:
    return read(model, after(model, SegmentCache(model, plan, prompt_length=len(ids)), prefix), ids)


def together(
    model: Model,
    documents: list[SegmentCache],
    prefix: SegmentCache | None,
    plan: Plan | None = None,
    position: Position | None = None,
) -> SegmentCache:
    return beside(model, SegmentCache(model, plan), prefix, documents, position=position)


def asked(
    model: Model, cache: SegmentCache, ids: torch.Tensor = QUESTION, chunks: tuple[int, ...] = ()
) -> torch.Tensor:
    """Logits of ids [B,T], fed after all that `cache` holds and stands after."""
    return feed(model, cache, ids, chunks or [ids.shape[1]], shift=cache.segments[0].place)


def owned(cache: SegmentCache) -> int:
    """Bytes of a cache without those that it only stands after."""
    return sum(buffer.nbytes for layer in cache.segments for lane in layer.lanes() for buffer in lane.buffers())
