"""How much a layer's attention output changes under plans, if that layer alone is compressed.

    e_l = mean over decode steps of  ‖(o_l − ô_l)·W_Oᵀ‖ / (‖o_l·W_Oᵀ‖ + ε)

o is the output over the full cache, ô that over the plan's, for the same queries: those of the unchanged model, whose
layers all go on from o. (CompressKV: Lin et al., arXiv 2508.02401.) So one prefill and one decode serve all plans. It
says nothing of how errors of several layers add up, nor of what they do to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.corpus.base import Sample
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.serving import Attention, Layer

Progress = Callable[[int, int, str], None]
EPSILON = 1e-5


class _Beside(Layer):
    """One layer many times: what the full cache gives goes on, and how far each plan's is from it is written down."""

    def __init__(self, full: SegmentLayer, plans: Sequence[SegmentLayer], projection: torch.Tensor):
        super().__init__()
        self.full, self.plans, self.projection = full, plans, projection.float()
        self.errors: list[list[float]] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        whole = self.full.attend(q, k, v, call)
        size = self._size(whole) + EPSILON
        self.errors.append([self._size(whole - plan.attend(q, k, v, call)) / size for plan in self.plans])
        return whole

    def _size(self, x: torch.Tensor) -> float:
        """[1,H,1,D] → the length of what the output projection makes of it."""
        return float((self.projection @ x.float().flatten()).norm())

    def get_seq_length(self) -> int:
        return self.full.get_seq_length()


def errors(model: Model, plans: Sequence[Plan], samples: Sequence[Sample], progress: Progress) -> torch.Tensor:
    """fp64 [N,P,L], by sample and plan. Prompts are prefilled densely, and their answers decoded with the true
    tokens."""
    rows = []
    for done, sample in enumerate(samples, 1):
        assert sample.answer is not None
        tokens = torch.cat([sample.tokens, sample.answer])[None].to(model.device)
        rows.append(_errors(model, plans, tokens, len(sample.tokens) - 1))
        progress(done, len(samples), f"{sample.kind} of {len(sample.tokens)} tokens")
    return torch.stack(rows)


def _errors(model: Model, plans: Sequence[Plan], tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """tokens int64 [1,T], of which the first `prompt` are prefilled, and all but the last of the others decoded;
    fp64 [P,L]."""
    full, thin = SegmentCache(model), [SegmentCache(model, plan, prompt_length=prompt) for plan in plans]
    full.record_for(*plans)
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=tokens[:, :prompt], past_key_values=full)
        for cache in thin:
            cache.adopt(full)
        layers: list[Any] = [
            _Beside(mine, [cache.segments[layer] for cache in thin], model.output_projection(layer))
            for layer, mine in enumerate(full.segments)
        ]
        for at in range(prompt, tokens.shape[1] - 1):
            model.network.base_model(input_ids=tokens[:, at : at + 1], past_key_values=Cache(layers=layers))
    return torch.tensor([layer.errors for layer in layers], dtype=torch.float64).mean(1).T
