"""Documents that were read apart, each after one shared prefix, and what goes on from several of them in any order.

    prefix = read(model, SegmentCache(model), ids)                    held once, as the model made it
    document = read(model, after(model, SegmentCache(model, plan), prefix), ids)      sees the prefix and itself
    cache = beside(model, SegmentCache(model), prefix, [one, other], position="shared")

Every document was read at the positions p … p + n_i − 1 that follow a prefix of p tokens. Where they stand afterwards:

    shared      where they were read, one over the other; what follows begins at p + max n_i (APE, arXiv 2502.05431)
    contiguous  one behind the other in the order given; what follows begins at p + Σ n_i

Shared positions make the order meaningless. Contiguous ones move document i by the lengths of those before it, exactly
as RoPE would have turned its keys there; what a document's own tokens saw when they were read is the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.contexts import Context, Contexts
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.rotary import Rotary
from kvtool.slots import Position


def read(
    model: Model, cache: SegmentCache, ids: torch.Tensor, chunk: int = 0, done: Callable[[], None] = lambda: None
) -> SegmentCache:
    """Feed ids int64 [T] to `cache`, after all that it holds and stands after; `done` is told of each chunk."""
    place = cache.segments[0].place
    with model.served(), torch.no_grad():
        for piece in ids.to(model.device).split((0 if cache.at_once else chunk) or max(1, len(ids))):
            positions = torch.arange(place, place + len(piece), device=model.device)
            model.network.base_model(input_ids=piece[None], position_ids=positions[None], past_key_values=cache)
            place += len(piece)
            done()
    return cache


def after(model: Model, cache: SegmentCache, prefix: SegmentCache | None) -> SegmentCache:
    """`cache`, which nothing was fed to yet, stands after `prefix`, and holds nothing of it; returns it."""
    return cache if prefix is None else beside(model, cache, prefix, ())


def beside(
    model: Model,
    cache: SegmentCache,
    prefix: SegmentCache | None,
    documents: Sequence[SegmentCache],
    *,
    position: Position | None = None,
) -> SegmentCache:
    """`cache`, which nothing was fed to yet, sees prefix and documents and holds nothing of them; returns it. Without
    documents it may be one that was read after the prefix, in another run say, and is put there again. Its plan says
    with what temperature and scale documents take part, and where they stand, unless `position` does.

    Raises InputError unless the prefix is the full cache's and every document was read after it, for contiguous
    documents unless moving keys is exact in this model, and for a cache of tokens that never saw the documents.
    """
    if documents and cache.segments[0].columns:
        raise InputError(
            "documents cannot be put before what was read without them", got=f"{cache.segments[0].columns} tokens",
            expected="a cache that nothing was fed to", remedy="put the documents before a new cache, then feed that",
        )  # fmt: skip
    first = 0 if prefix is None else _prefixed(prefix)
    begun = cache.segments[0].place - cache.segments[0].columns
    if cache.segments[0].columns and begun != first:
        raise InputError("what goes on from a prefix was read at other positions", got=begun, expected=first)
    told = None if cache.plan is None or cache.plan.read is None else cache.plan.read.documents
    position = position or (told.position if told is not None else "shared")
    lengths = [_length(document, first) for document in documents]
    starts = [first + sum(lengths[:at]) if position == "contiguous" else first for at in range(len(lengths))]
    end = max((start + length for start, length in zip(starts, lengths, strict=True)), default=first)
    for document in documents:
        document.finish()
    rotaries = [model.rotary(index) for index in range(len(cache.segments))]
    if any(start != first for start in starts):
        check_moves(rotaries, end)
    for index, (layer, rotary) in enumerate(zip(cache.segments, rotaries, strict=True)):
        layer.contexts = Contexts(
            layer.place - layer.columns if layer.columns else end,
            None if prefix is None else Context(prefix, prefix.segments[index], 0, rotary),
            [
                Context(document, document.segments[index], start, rotary, start - first)
                for document, start in zip(documents, starts, strict=True)
            ],
            1.0 if told is None else float(told.temperature[index]),
            1.0 if told is None else float(told.scale[index]),
        )
    return cache


def check_moves(rotaries: Sequence[Rotary], end: int) -> None:
    """Raise InputError unless documents that end before position `end` can be moved exactly. Where rotation changes
    with the length of a text, what is written later may still be refused, by the rotary itself."""
    steady = [rotary.steady for rotary in rotaries if rotary.steady is not None]
    got = expected = ""
    if all(rotary.module is None for rotary in rotaries):
        got, expected = "positions that enter elsewhere than by rotation", "RoPE"
    elif steady and end >= min(steady):
        got = f"{end} tokens under a RoPE that turns keys otherwise in longer texts"
        expected = f"fewer than {min(steady)}"
    if got:
        raise InputError(
            "documents cannot be moved in this model", got=got, expected=expected,
            remedy="let them share their positions",
        )  # fmt: skip


def _prefixed(prefix: SegmentCache) -> int:
    """Tokens of a prefix; raises InputError unless it is one sequence under the full plan."""
    if not prefix.single:
        raise InputError("a shared prefix is one sequence without padding, fed before documents are read after it")
    if prefix.plan is not None and any(prefix.plan.slots.values()):
        raise InputError(
            "a prefix of documents is held as the model made it", got=f"a cache of the plan {prefix.plan.method}",
            expected="the full cache", remedy="plans are for the documents",
        )  # fmt: skip
    return prefix.segments[0].place


def _length(document: SegmentCache, first: int) -> int:
    """Tokens of a document; raises InputError unless it is one sequence that begins at position `first`."""
    if not document.single:
        raise InputError("a document is one sequence without padding")
    read = document.plan.read if document.plan is not None else None
    if read is not None and (read.cut is not None or read.query != "own"):
        raise InputError(
            "a document's plan goes by what is written after it, which the document does not see",
            got=f"cut {read.cut}, query {read.query!r}",
            remedy="save the document under a plan without cut, whose steps choose by their own queries",
        )  # fmt: skip
    layer = document.segments[0]
    if layer.place - layer.columns != first:
        raise InputError(
            "a document was read at other positions", got=layer.place - layer.columns, expected=first,
            remedy="read every document after the same prefix",
        )  # fmt: skip
    return layer.columns
