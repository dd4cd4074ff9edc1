"""From a plan to lanes: KV heads of a layer with the same policy share one. It knows slots, not methods."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from kvtool.cache.bulk import Bulk
from kvtool.cache.keep.selector import Selector
from kvtool.cache.keep.thinned import Thinned
from kvtool.cache.lane import Lane
from kvtool.cache.nothing import Nothing
from kvtool.cache.onward import Onward
from kvtool.cache.read.board import Board, Place
from kvtool.cache.read.reader import Reader
from kvtool.cache.read.sparse import Sparse
from kvtool.cache.store.coded import Coded
from kvtool.cache.store.pool import Member, Pool
from kvtool.cache.store.rest import Rest
from kvtool.cache.window import Window
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import EVERYTHING, RAW, Read, Select, Store


def lanes(
    model: Model, plan: Plan | None, layer: int, prompt_length: int, part: int = 0, board: Board | None = None
) -> list[Lane]:
    """The lanes of one layer, empty, for a part of the batch; layers that read what others choose meet at `board`."""
    window = model.geometry.windows[layer]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for head in range(model.geometry.kv_heads):
        groups.setdefault(_policy(plan, layer, head, window, prompt_length), []).append(head)
    board = board or Board()
    return [
        _lane(model, plan, Place(part, layer, tuple(heads), board), window, policy, prompt_length)
        for policy, heads in groups.items()
    ]


def per_row(plan: Plan | None) -> bool:
    """Do rows of a batch come to hold different numbers of entries, or entries encoded for them alone?"""
    spec = plan.keep.select if plan is not None and plan.keep is not None else None
    fitted = plan is not None and plan.store is not None and plan.store.fits
    leaving = plan is not None and plan.keep is not None and plan.keep.leaving
    return fitted or leaving or (spec is not None and spec.ragged and not spec.lossless)


def sparse(model: Model, plan: Plan | None, layer: int, prompt_length: int | None, board: Board) -> Sparse | None:
    """What chooses the entries that a prompt's queries read in this layer, if anything does."""
    spec = None if plan is None or plan.read is None else plan.read.prefill
    if spec is None or not spec.runs(layer):
        return None
    return Sparse(spec, layer, prompt_length, model.rotary(layer), board)


def onward(model: Model, plan: Plan | None, prompt_length: int | None) -> Onward | None:
    """What chooses the tokens of a prompt that later layers run for, if not all."""
    if plan is None or plan.keep is None or plan.keep.onward is None or not plan.keep.leaving:
        return None
    return Onward(model, plan.keep.onward, prompt_length)


def _policy(plan: Plan | None, layer: int, head: int, window: int | None, prompt_length: int) -> tuple[Any, ...]:
    """What heads must have in common to share a lane."""
    keep = plan.keep if plan is not None else None
    if keep is not None and keep.gone[layer]:
        return ("nothing",)
    if keep is not None and int(keep.recent[layer, head]) != EVERYTHING:
        recent = max(int(keep.recent[layer, head]), round(keep.recent_ratio * prompt_length))
        return ("window", int(keep.sink[layer, head]), recent, bool(keep.compensate[layer, head]))
    if window is not None:
        return ("window", 0, window, False)
    spec = keep.select if keep is not None else None
    own = None if spec is None else head if _alone(spec) else float(spec.budget[layer, head])
    store = plan.store if plan is not None else None
    return ("bulk", RAW if store is None else int(store.index[layer, head]), own, _beyond(store, layer, head))


def _beyond(store: Store | None, layer: int, head: int) -> tuple[Any, ...]:
    """Which encodings a head's older and its dropped entries have."""
    if store is None:
        return ()
    rest = RAW if store.rest is None else int(store.rest.index[layer, head])
    older = [] if store.older is None else [int(store.older.index[layer, head]), *_beyond(store.older, layer, head)]
    return (rest, *older)


def _alone(spec: Select) -> bool:
    """May each head's count differ, so that each needs a lane of its own?"""
    return (spec.apart or spec.mass > 0 or spec.least > 0) and not spec.alike


def _lane(
    model: Model, plan: Plan | None, place: Place, window: int | None, policy: tuple[Any, ...], prompt_length: int
) -> Lane:
    layer, heads = place.layer, list(place.heads)
    if policy[0] == "nothing":
        return Nothing(heads)
    if policy[0] == "window":
        _, sink, recent, compensate = policy
        turn = plan is not None and plan.keep is not None and plan.keep.position == "reindex"
        return Window(
            heads, sink=sink, recent=recent, compensate=compensate, model_window=window,
            reindex=place.board.rotary(model.rotary(layer)) if turn else None,
        )  # fmt: skip
    if plan is None:
        return Bulk(heads)
    options: dict[str, Any] = {}
    spec = plan.keep.select if plan.keep is not None else None
    if spec is not None:
        budget = spec.budget[layer, heads].tolist()
        options["selector"] = Selector(spec, budget, layer, heads, prompt_length, model.rotary(layer), place.board)
        if plan.keep is not None and plan.keep.position != "original":
            options |= {"rotary": model.rotary(layer), "reindex": True, "again": plan.keep.position == "reencode"}
    if plan.store is not None:
        options |= _stored(model, plan.store, place, policy[1])
    read = plan.read
    if read is not None and read.acts(layer):
        options["reader"] = Reader(read, replace(place, rotary=model.rotary(layer)))
    if read is not None and options.keys() & {"reader", "key"}:
        options |= _limits(read, plan.store)
    return Bulk(heads, **options) if spec is None else Thinned(heads, **options)


def _stored(model: Model, store: Store, place: Place, number: int) -> dict[str, Any]:
    """What a lane is told of how its entries are encoded."""
    layer, heads = place.layer, list(place.heads)
    options: dict[str, Any] = {"rotary": place.board.rotary(model.rotary(layer))}
    if number != RAW:
        chain = _chain(store)
        pairs, limits = [_pair(one, layer, heads, model) for one in chain], [one.held for one in chain[:-1]]
        options |= {"sink": store.sink, "recent": store.recent, "block": store.block}
        options["once"] = store.once
        options |= {"key": pairs[0][0], "value": pairs[0][1], "older": pairs[1:], "limits": limits}
        if len(store.span(layer)) > 1:
            options["member"] = _member(model, store, place, number)
    if store.rest is not None and int(store.rest.index[layer, heads[0]]) != RAW:
        coded = Coded(*_pair(store.rest, layer, heads, model), options["rotary"])
        options["rest"] = Rest(coded, store.rest.block)
    return options


def _chain(store: Store) -> list[Store]:
    """A store and those of older and older entries."""
    return [store, *([] if store.older is None else _chain(store.older))]


def _pair(store: Store, layer: int, heads: list[int], model: Model) -> tuple[Encoding, Encoding]:
    """The encodings of these heads, which share one."""
    number = int(store.index[layer, heads[0]])
    key, value = (side[number].heads(heads, model.geometry.kv_heads) for side in (store.keys, store.values))
    return key, value


def _limits(read: Read, store: Store | None) -> dict[str, int]:
    """Of all heads and layers alike, raw ones too: what one layer chooses, another may read."""
    sink, recent, block = (0, 0, 1) if store is None else (store.sink, store.recent, store.block)
    return {"sink": max(sink, read.sink), "recent": max(recent, read.recent), "block": math.lcm(block, read.block)}


def _member(model: Model, store: Store, place: Place, number: int) -> Member:
    """The layer's share of its span's pool, which the span's first layer founds."""
    span = store.span(place.layer)
    first = span[0]
    if place.layer == first:
        coded = Coded(store.keys[number], store.values[number], place.board.rotary(model.rotary(first)))
        place.board.pools[place.part, first] = Pool(coded, len(span), model.geometry.kv_heads)
    elif model.rotary(place.layer).kind != model.rotary(first).kind and not store.keys[number].rotated:
        raise InputError(
            f"layers {first} and {place.layer} rotate keys differently and cannot be stored as one before RoPE"
        )
    return Member(place.board.pools[place.part, first], place.layer - first)
