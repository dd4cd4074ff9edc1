"""Teacher-forced decoding: all tokens after a prompt in one forward, each of which sees what a decode step would.

    logits [B,T,V] of tokens [B,T];   greedy decoding writes `answer` iff every argmax of what precedes it is its token

A chunk of the protocol "strict" is decode by law (`tests/laws/test_chunks.py`), so that a prompt's cache, however it
was compressed, is switched to that protocol once the prompt is in. Only layers that are written as one cannot be fed
so beyond the token after which a block of theirs is written: there, tokens go block by block. It costs about one step
instead of T, except under plans whose attention goes token by token. The cache is used up: it goes on from the last of
the tokens.

Where a plan reads what a question asks for (`Read.query` "together"), a question that is asked later is fed as it is
served: as a chunk, a prompt of its own. Under other plans that would show a chunk more than its steps see.
"""

from __future__ import annotations

import torch

from kvtool.cache.bulk import Bulk
from kvtool.cache.segment_cache import SegmentCache
from kvtool.model import Model


def forced(model: Model, cache: SegmentCache, tokens: torch.Tensor, question: int = 0) -> torch.Tensor:
    """`cache` has seen the prompt; tokens int64 [B,T] follow → logits fp32 [B,T,V], on the CPU. The first `question`
    of them are a question, to plans that read what a question asks for; to others they are steps like any."""
    cache.finish()
    read = None if cache.plan is None else cache.plan.read
    first = question if read is not None and read.asked_together else 0
    outs = [_fed(model, cache, tokens[:, :first])] if first else []
    tokens = tokens[:, first:]
    for layer in cache.segments:
        layer.strict = layer.decoded = True
    while tokens.shape[1]:
        count = _piece(cache, tokens.shape[1])
        outs.append(_fed(model, cache, tokens[:, :count]))
        tokens = tokens[:, count:]
    return torch.cat(outs, dim=1)


def _fed(model: Model, cache: SegmentCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of tokens int64 [B,T], in one forward."""
    with model.served(), torch.no_grad():
        return model.network(input_ids=tokens.to(model.device), past_key_values=cache).logits.float().cpu()


def _piece(cache: SegmentCache, tokens: int) -> int:
    """How many of these tokens come before the next block that layers write as one."""
    lanes = (lane for layer in cache.segments for lane in layer.lanes())
    return min((lane.pieces(tokens)[0] for lane in lanes if isinstance(lane, Bulk) and lane.member), default=tokens)
