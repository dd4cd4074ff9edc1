"""How far predictions under plans are from the full cache's, on given texts: one prefill serves all plans.

    KL = mean over the answer's tokens of Σ_v p(v)·(log p(v) − log p̂(v)), nats; p under the full cache

The prompt is prefilled densely, as published methods are, and the answer forced token by token (`replay/forced.py`).
Prompts and the full cache's predictions are held as long as the judge is: bytes of [texts, answer, vocabulary] in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.replay.forced import forced


class Judge:
    """Each of `samples` has a prompt and an answer. No plan may need a prompt's queries: it only stores."""

    def __init__(self, model: Model, samples: Sequence[Sample]):
        self.model = model
        self.texts = [self._read(sample) for sample in samples]
        self.full = [self._after(None, prompt, fed) for prompt, fed, _ in self.texts]

    def _read(self, sample: Sample) -> tuple[SegmentCache, torch.Tensor, torch.Tensor]:
        """The prefilled prompt without its last token, what is fed after it, int64 [1,A], and what is to follow."""
        assert sample.answer is not None
        prompt = SegmentCache(self.model)
        with self.model.served(), torch.no_grad():
            ids = sample.tokens[None, :-1].to(self.model.device)
            self.model.network.base_model(input_ids=ids, past_key_values=prompt)
        return prompt, torch.cat([sample.tokens[-1:], sample.answer[:-1]])[None], sample.answer

    def _after(self, plan: Plan | None, prompt: SegmentCache, fed: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [A,V] of the tokens after each of `fed`."""
        cache = SegmentCache(self.model, plan, prompt_length=prompt.get_seq_length())
        cache.tell(fed)
        cache.adopt(prompt)
        return forced(self.model, cache, fed)[0].log_softmax(-1)

    def judged(self, plan: Plan) -> torch.Tensor:
        """KL, and by how much the loss of the true tokens is above the full cache's, on each text: fp64 [N,2]."""
        return torch.stack([self.on(number, plan) for number in range(len(self.texts))])

    def on(self, number: int, plan: Plan) -> torch.Tensor:
        """As `judged`, on one of the texts: fp64 [2]."""
        (prompt, fed, true), full = self.texts[number], self.full[number]
        own = self._after(plan, prompt, fed)
        loss = (full - own).gather(1, true[:, None])
        return torch.stack([(full.exp() * (full - own)).sum(-1).double().mean(), loss.double().mean()])

    def divergences(self, plan: Plan) -> torch.Tensor:
        """KL on each text, fp64 [N]."""
        return self.judged(plan)[:, 0]
