"""What reading documents apart costs: predictions of a known answer after documents read one after the other, and after
the same documents read apart, however they are put together.

    KL = mean over the answer's tokens of Σ_v p(v)·(log p(v) − log p̂(v)), nats; p after sequential reading
    loss = −mean log p̂(token of the answer);   p̂ after documents read apart

Documents are read once, and serve every way of putting them together.
"""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import after, beside, read
from kvtool.corpus.shelves import Shelf
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Documents, Read


class Apart:
    """One shelf, whose documents are held under `plan`."""

    def __init__(self, model: Model, shelf: Shelf, plan: Plan | None = None):
        self.model, self.shelf = model, shelf
        self.prefix = read(model, SegmentCache(model), shelf.prefix)
        self.documents = [
            read(model, after(model, SegmentCache(model, plan, prompt_length=len(ids)), self.prefix), ids)
            for ids in shelf.documents
        ]

    def sequential(self) -> torch.Tensor:
        """Log-probabilities fp32 [A,V] of the answer's tokens when all is read in order."""
        cache = read(self.model, SegmentCache(self.model), torch.cat([self.shelf.prefix, *self.shelf.documents]))
        return self._answered(cache)

    def together(self, how: Documents) -> torch.Tensor:
        """The same when documents are put together so."""
        cache = SegmentCache(self.model, planned(self.model, how))
        return self._answered(beside(self.model, cache, self.prefix, self.documents))

    def _answered(self, cache: SegmentCache) -> torch.Tensor:
        ids, place = self.shelf.asked[None].to(self.model.device), cache.segments[0].place
        positions = torch.arange(place, place + ids.shape[1], device=self.model.device)
        with self.model.served(), torch.no_grad():
            logits = self.model.network(
                input_ids=ids, position_ids=positions[None], past_key_values=cache,
                logits_to_keep=len(self.shelf.answer),
            ).logits  # fmt: skip
        return logits[0].float().log_softmax(-1).cpu()


def planned(model: Model, how: Documents) -> Plan:
    """The plan that only says how documents take part."""
    everything = torch.ones(model.geometry.layers)
    return Plan("documents", model.fingerprint, read=Read(everything, unit=1, documents=how))


def divergence(p: torch.Tensor, other: torch.Tensor) -> float:
    """KL of log-probabilities [A,V], mean over the answer."""
    return float((p.exp() * (p - other)).sum(-1).double().mean())


def loss(p: torch.Tensor, answer: torch.Tensor) -> float:
    """Mean loss of answer int64 [A] under log-probabilities [A,V]."""
    return -float(p.gather(1, answer[:, None]).double().mean())
