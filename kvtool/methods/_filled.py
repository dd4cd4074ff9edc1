"""Caches that a prompt has just filled, before a selection frees what it does not choose, for methods that calibrate on
what a selection sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.selector import Selector
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.lane import Step
from kvtool.cache.segment_cache import SegmentCache
from kvtool.corpus.base import Sample
from kvtool.methods._base import Context
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep


def filled(context: Context, keep: Keep, samples: Sequence[Sample], what: str) -> Iterator[SegmentCache]:
    """One cache after another, each holding all of one prompt. what: is measured, as progress calls it."""
    for number, sample in enumerate(samples):
        yield fed(context.running, keep, sample.tokens)
        context.progress(number + 1, len(samples), what)


def fed(model: Model, keep: Keep, tokens: torch.Tensor) -> SegmentCache:
    """A cache that holds tokens int64 [n]."""
    cache = SegmentCache(model, Plan("calibration", model.fingerprint, keep=keep))
    with model.served(), torch.no_grad():
        model.network.base_model(input_ids=tokens[None].to(model.device), past_key_values=cache)
    return cache


def selecting(cache: SegmentCache) -> Iterator[tuple[int, Selector, View]]:
    """What the selection looks at: a layer, a selector of some of its heads, and what that one sees."""
    for number, layer in enumerate(cache.segments):
        for lane in layer.lanes():
            if isinstance(lane, Thinned):
                yield number, lane.selector, lane.view(Step(0, layer.scale, layer.softcap))


def scored(model: Model, keep: Keep, tokens: torch.Tensor) -> list[torch.Tensor | None]:
    """Scores [K,n] of the entries of tokens int64 [n], layer by layer; None in layers that nothing thins."""
    return scores(fed(model, keep, tokens), keep)


def scores(cache: SegmentCache, keep: Keep) -> list[torch.Tensor | None]:
    """The same of what a cache of `keep` holds."""
    cache.look_again()
    rows: list[dict[int, torch.Tensor]] = [{} for _ in cache.segments]
    for layer, selector, view in selecting(cache):
        rows[layer] |= dict(zip(selector.heads, selector.scores(view)[0], strict=True))
    return [torch.stack([found[head] for head in sorted(found)]) if found else None for found in rows]
