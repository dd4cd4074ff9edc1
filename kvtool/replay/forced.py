"""Teacher-forced decoding: all tokens after a prompt in one forward, each of which sees what a decode step would.

    logits [B,T,V] of tokens [B,T];   greedy decoding writes `answer` iff every argmax of what precedes it is its token

A chunk of the protocol "strict" is decode by law (`tests/laws/test_chunks.py`), so that a prompt's cache, however it
was compressed, is switched to that protocol once the prompt is in. Only layers that are written as one cannot be fed
so: there, tokens go one by one. It costs about one step instead of T, except under plans whose attention goes token by
token. The cache is used up: it goes on from the last of the tokens.
"""

from __future__ import annotations

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model


def forced(model: Model, cache: SegmentCache, tokens: torch.Tensor) -> torch.Tensor:
    """`cache` has seen the prompt; tokens int64 [B,T] follow → logits fp32 [B,T,V], on the CPU."""
    cache.finish()
    joined = cache.plan is not None and cache.plan.store is not None and bool(cache.plan.store.spans)
    if not joined:
        for layer in cache.segments:
            layer.strict = layer.decoded = True
    outs = []
    with model.served(), torch.no_grad():
        for piece in tokens.split(1 if joined else tokens.shape[1], dim=1):
            output = model.network(input_ids=piece.to(model.device), past_key_values=cache)
            outs.append(output.logits.float().cpu())
    return torch.cat(outs, dim=1)
