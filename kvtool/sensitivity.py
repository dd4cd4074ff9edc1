"""How much a layer's attention output changes under a plan, if that layer alone is compressed.

    e_l = mean over decode steps of  ‖(o_l − ô_l)·W_Oᵀ‖ / (‖o_l·W_Oᵀ‖ + ε)

o is the output over the full cache, ô that over the plan's, for the same queries: those of the unchanged model, whose
layers all go on from o. (CompressKV: Lin et al., arXiv 2508.02401.) It says nothing of how errors of
several layers add up, nor of what they do to the logits.
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


class _Pair(Layer):
    """One layer twice: what the full cache gives goes on, and how far the plan's is from it is written down."""

    def __init__(self, full: SegmentLayer, plan: SegmentLayer, projection: torch.Tensor):
        super().__init__()
        self.full, self.plan, self.projection = full, plan, projection
        self.errors: list[float] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        whole, less = (layer.attend(q, k, v, call) for layer in (self.full, self.plan))
        size, change = (self._projected(x).norm() for x in (whole, whole - less))
        self.errors.append(float(change / (size + EPSILON)))
        return whole

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        """[1,H,1,D] → [hidden]."""
        return self.projection.float() @ x.float().flatten()

    def get_seq_length(self) -> int:
        return self.full.get_seq_length()


def errors(model: Model, plan: Plan, samples: Sequence[Sample], progress: Progress) -> torch.Tensor:
    """fp64 [N,L], one row a sample. Prompts are prefilled densely, and their answers decoded with the true tokens."""
    rows = []
    for done, sample in enumerate(samples, 1):
        assert sample.answer is not None
        tokens = torch.cat([sample.tokens, sample.answer])[None].to(model.device)
        rows.append(_errors(model, plan, tokens, len(sample.tokens) - 1))
        progress(done, len(samples), f"{sample.kind} of {len(sample.tokens)} tokens")
    return torch.stack(rows)


def _errors(model: Model, plan: Plan, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """tokens int64 [1,T], of which the first `prompt` are prefilled, and all but the last of the others decoded."""
    full, thin = SegmentCache(model), SegmentCache(model, plan, prompt_length=prompt)
    full.record_for(plan)
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=tokens[:, :prompt], past_key_values=full)
        thin.adopt(full)
        pairs: list[Any] = [
            _Pair(mine, theirs, model.output_projection(layer))
            for layer, (mine, theirs) in enumerate(zip(full.segments, thin.segments, strict=True))
        ]
        for at in range(prompt, tokens.shape[1] - 1):
            model.network.base_model(input_ids=tokens[:, at : at + 1], past_key_values=Cache(layers=pairs))
    return torch.tensor([sum(pair.errors) / len(pair.errors) for pair in pairs], dtype=torch.float64)
