"""How little attention changes the residual stream while some layers attend to nothing.

    s_l = mean over tokens of cos(x, x + Attn(LN(x)))      with the layers of `dropped` putting out 0

As the statistic `residual` sums it over the whole model; here under a plan that drops layers, so that what remains is
judged by the stream that it then meets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.model import Model
from kvtool.observing.stream import stream_hooks
from kvtool.plan import Plan
from kvtool.slots import Keep
from kvtool.statistics._base import cosines


def similarity(model: Model, samples: Sequence[Sample], keep: Keep) -> torch.Tensor:
    """fp32 [L] over all tokens of the samples; 1 where a dropped layer puts out nothing."""
    total = torch.zeros(model.geometry.layers, dtype=torch.float64)

    def tell(what: str, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if what == "attended":
            total[index] += float(cosines(before[0], after[0]))

    hooks = stream_hooks(model, tell)
    try:
        for sample in samples:
            cache = SegmentCache(model, Plan("dropping", model.fingerprint, keep=keep))
            with model.served(), torch.no_grad():
                model.network.base_model(input_ids=sample.tokens[None].to(model.device), past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    return (total / sum(len(sample.tokens) for sample in samples)).float()
