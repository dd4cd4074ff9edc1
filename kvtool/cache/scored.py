"""What a selection scores the entries of a prompt, for methods that calibrate on such scores."""

from __future__ import annotations

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Step
from kvtool.cache.rebuild import rebuild
from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep


def scored(model: Model, keep: Keep, tokens: torch.Tensor) -> list[torch.Tensor | None]:
    """Scores [K,n] of the entries of tokens int64 [n], layer by layer; None in layers that nothing thins."""
    cache = SegmentCache(model, Plan("scores", model.fingerprint, keep=keep))
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=tokens[None].to(model.device), past_key_values=cache)
    if keep.select is not None and keep.select.observe == "rebuild":
        rebuild(model.network, cache.segments)
    found: list[torch.Tensor | None] = []
    for layer in cache.segments:
        rows: dict[int, torch.Tensor] = {}
        for lane in layer.lanes():
            if isinstance(lane, Bulk) and lane.selector is not None:
                scores = lane.selector.scores(lane.view(Step(0, layer.scale, layer.softcap)))
                rows |= dict(zip(lane.heads, scores[0], strict=True))
        found.append(torch.stack([rows[head] for head in sorted(rows)]) if rows else None)
    return found
