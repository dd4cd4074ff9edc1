"""Feeding tokens to a model in chunks, through kvtool's caches and through the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan

T = TypeVar("T")


def feed(
    model: Model,
    cache: Cache,
    ids: torch.Tensor,
    chunks: Sequence[int],
    *,
    mask: torch.Tensor | None = None,
    shift: int = 0,
) -> torch.Tensor:
    """Logits [B,T,V] of ids [B,T], fed in `chunks`; mask [B,T] is 0 on left padding; positions start at `shift`."""
    with model.served(), torch.no_grad():
        return _feed(model, cache, ids, chunks, mask, shift)


def by_default(dtype: torch.dtype, work: Callable[[], T]) -> T:
    """What `work` returns where PyTorch makes tensors of this dtype if none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return work()
    finally:
        torch.set_default_dtype(before)


def own(
    model: Model, ids: torch.Tensor, chunks: Sequence[int] = (), *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The same by the model itself: one forward pass, or chunk by chunk with transformers' `DynamicCache`."""
    with torch.no_grad():
        if not chunks:
            return model.network(input_ids=ids, attention_mask=mask, position_ids=_positions(ids, mask, 0)).logits
        return _feed(model, DynamicCache(config=model.network.config), ids, chunks, mask, 0)


def _feed(
    model: Model, cache: Cache, ids: torch.Tensor, chunks: Sequence[int], mask: torch.Tensor | None, shift: int
) -> torch.Tensor:
    assert sum(chunks) == ids.shape[1]
    positions = _positions(ids, mask, shift)
    logits, start = [], 0
    for count in chunks:
        end = start + count
        out = model.network(
            input_ids=ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def _positions(ids: torch.Tensor, mask: torch.Tensor | None, shift: int) -> torch.Tensor:
    seen = torch.ones_like(ids) if mask is None else mask
    return (seen.cumsum(1) - 1).clamp_min(0) + shift


def left_padded(ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [T_i] → (ids [B,T], mask [B,T]), padded on the left with token 1."""
    length = max(len(row) for row in ids)
    batch = torch.ones(len(ids), length, dtype=torch.long)
    mask = torch.zeros(len(ids), length, dtype=torch.long)
    for index, row in enumerate(ids):
        batch[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return batch, mask


def rows_held(model: Model, plan: Plan, ids: torch.Tensor, chunks: Sequence[int], layer: int = 0) -> list[list[int]]:
    """The tokens of ids [1,T] whose entries the KV heads of a layer hold, in order. At decode steps of the first layer
    only: its keys depend on the tokens alone."""
    full, cache = SegmentCache(model), SegmentCache(model, plan, prompt_length=chunks[0])
    for each in (full, cache):
        feed(model, each, ids, chunks)
        each.finish()
    keys = next(full.segments[layer].lanes()).recall()[0][0]
    found: dict[int, list[int]] = {}
    for lane in cache.segments[layer].lanes():
        apart = (lane.recall()[0][0][:, :, None] - keys[lane.heads][:, None]).abs().amax(-1)
        found |= {head: row.argmin(1).tolist() for head, row in zip(lane.heads, apart, strict=True)}
    return [found[head] for head in sorted(found)]
