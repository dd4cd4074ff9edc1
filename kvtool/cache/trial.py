"""Tokens on trial: a transformers cache over a `SegmentCache` that reads what is held and keeps nothing.

The network runs over it as over any cache; what it is fed stands in scratch, dense, after everything that the cache
holds. `drop` forgets it, `cut` its last tokens, and `keep` gives its first tokens to caches, as if they had been
decoded there. So nothing that was held, evicted or encoded is ever rolled back.

Attention over the held entries and the scratch is that of decode steps (see `Lane.trial`): exact where entries are
held as they came, windows included, and the full cache's therefore; blocks of a store move, and scores evict, once
tokens are kept. One sequence, without padding.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.segment_layer import SegmentLayer
from kvtool.errors import InputError
from kvtool.serving import Attention, Layer


class TrialLayer(Layer):
    """`held` and the scratch: q [1,H,N,D], k and v [1,K,N,D] of the tokens on trial."""

    def __init__(self, held: SegmentLayer):
        super().__init__()
        self.held = held
        self.scratch: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Attention) -> torch.Tensor:
        new = [q, k, v]
        self.tokens += [] if call.tokens is None else [call.tokens]
        self.scratch = [torch.cat(pair, dim=2) for pair in zip(self.scratch, new, strict=True)] if self.scratch else new
        _, keys, values = self.scratch
        return self.held.trial(q, keys, values, call)

    def get_seq_length(self) -> int:
        return self.held.columns + (self.scratch[0].shape[2] if self.scratch else 0)


class Trial(Cache):
    """Raises InputError unless `cache` holds one sequence."""

    def __init__(self, cache: SegmentCache):
        if not cache.single:
            raise InputError("tokens on trial follow one sequence without padding", expected="a cache that was fed one")
        cache.finish()
        self.trials = [TrialLayer(layer) for layer in cache.segments]
        super().__init__(layers=list(self.trials))

    def drop(self) -> None:
        """Forget the tokens on trial."""
        self.cut(0)

    def cut(self, count: int) -> None:
        """Forget all but the first `count` tokens on trial."""
        for layer in self.trials:
            layer.scratch = [x[:, :, :count] for x in layer.scratch] if count else []
            layer.tokens = [torch.cat(layer.tokens, dim=1)[:, :count]] if count and layer.tokens else []

    def keep(self, count: int, *caches: SegmentCache) -> None:
        """The first `count` tokens on trial are kept by these caches; the others are forgotten."""
        for index, layer in enumerate(self.trials if count else ()):
            q, k, v = (x[:, :, :count] for x in layer.scratch)
            tokens = torch.cat(layer.tokens, dim=1)[:, :count] if layer.tokens else None
            for cache in caches:
                cache.segments[index].absorb(q, k, v, tokens)
        self.drop()
