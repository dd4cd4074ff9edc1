"""From a plan to lanes: KV heads of a layer with the same policy share one. It knows slots, not methods."""

from __future__ import annotations

import math
from typing import Any

from kvtool.cache.board import Board
from kvtool.cache.bulk import Bulk
from kvtool.cache.lane import Lane
from kvtool.cache.pool import Member, Pool
from kvtool.cache.reader import Place, Reader
from kvtool.cache.segments import Coded
from kvtool.cache.selector import Selector
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
    """Do rows of a batch come to hold different numbers of entries?"""
    spec = plan.keep.select if plan is not None and plan.keep is not None else None
    return spec is not None and spec.ragged and not spec.lossless


def _policy(plan: Plan | None, layer: int, head: int, window: int | None, prompt_length: int) -> tuple[Any, ...]:
    """What heads must have in common to share a lane."""
    keep = plan.keep if plan is not None else None
    if keep is not None and int(keep.recent[layer, head]) != EVERYTHING:
        recent = max(int(keep.recent[layer, head]), round(keep.recent_ratio * prompt_length))
        return ("window", int(keep.sink[layer, head]), recent, bool(keep.compensate[layer, head]))
    if window is not None:
        return ("window", 0, window, False)
    spec = keep.select if keep is not None else None
    own = None if spec is None else head if _alone(spec) else float(spec.budget[layer, head])
    store = plan.store if plan is not None else None
    return ("bulk", RAW if store is None else int(store.index[layer, head]), own)


def _alone(spec: Select) -> bool:
    """May each head's count differ, so that each needs a lane of its own?"""
    return (spec.apart or spec.mass > 0 or spec.least > 0) and not spec.alike


def _lane(
    model: Model, plan: Plan | None, place: Place, window: int | None, policy: tuple[Any, ...], prompt_length: int
) -> Lane:
    layer, heads = place.layer, list(place.heads)
    if policy[0] == "window":
        _, sink, recent, compensate = policy
        turn = plan is not None and plan.keep is not None and plan.keep.position == "reindex"
        return Window(
            heads, sink=sink, recent=recent, compensate=compensate, model_window=window,
            reindex=model.rotary(layer) if turn else None,
        )  # fmt: skip
    if plan is None:
        return Bulk(heads)
    options: dict[str, Any] = {}
    spec = plan.keep.select if plan.keep is not None else None
    if spec is not None:
        budget = spec.budget[layer, heads].tolist()
        options["selector"] = Selector(spec, budget, layer, heads, prompt_length, model.rotary(layer))
        if plan.keep is not None and plan.keep.position == "reindex":
            options |= {"rotary": model.rotary(layer), "reindex": True}
    if plan.store is not None and policy[1] != RAW:
        store = plan.store
        options |= {
            "sink": store.sink,
            "recent": store.recent,
            "block": store.block,
            "key": _checked(store.keys[policy[1]], heads, model),
            "value": _checked(store.values[policy[1]], heads, model),
            "rotary": model.rotary(layer),
        }
        if store.span > 1:
            options["member"] = _member(model, store, place, policy[1])
    read = plan.read
    if read is not None and read.acts(layer):
        options["reader"] = Reader(read, place)
    if read is not None and options.keys() & {"reader", "key"}:
        options |= _limits(read, plan.store)
    return Bulk(heads, **options)


def _limits(read: Read, store: Store | None) -> dict[str, int]:
    """Of all heads and layers alike, raw ones too: what one layer chooses, another may read."""
    sink, recent, block = (0, 0, 1) if store is None else (store.sink, store.recent, store.block)
    return {"sink": max(sink, read.sink), "recent": max(recent, read.recent), "block": math.lcm(block, read.unit)}


def _member(model: Model, store: Store, place: Place, number: int) -> Member:
    """The layer's share of its span's pool, which the span's first layer founds."""
    first = place.layer - place.layer % store.span
    if place.layer == first:
        coded = Coded(store.keys[number], store.values[number], model.rotary(first))
        place.board.pools[place.part, first] = Pool(coded, store.span, model.geometry.kv_heads)
    elif model.rotary(place.layer).kind != model.rotary(first).kind and not store.keys[number].rotated:
        raise InputError(
            f"layers {first} and {place.layer} rotate keys differently and cannot be stored as one before RoPE"
        )
    return Member(place.board.pools[place.part, first], place.layer - first)


def _checked(encoding: Encoding, heads: list[int], model: Model) -> Encoding:
    return encoding.heads(heads, model.geometry.kv_heads)
