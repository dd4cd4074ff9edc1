"""What a cache holds, as data: enough for a fresh one, made of the same plan, to go on from there.

    document = dump(lane);   fill(fresh, document)

A lane is made of parts: objects of this package that are no dataclasses, such as segments, selectors, readers. Of each
part every attribute is taken that is a tensor, a number, a word, None, or a list, tuple or dictionary of these; parts
in turn; and nothing else, since a plan's records, rotations and functions are there once a fresh cache is built. So no
part need know of files. One that does not want to be looked at defines `state()` and `restore(state)` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

Document = dict[str, Any]


@runtime_checkable
class Own(Protocol):
    """A part that says itself what it holds."""

    def state(self) -> Document: ...

    def restore(self, state: Document) -> None: ...


def dump(part: Any, seen: set[int] | None = None) -> Document:
    """What `part` holds; what was `seen` already, by another path, is left out."""
    seen = set() if seen is None else seen
    seen.add(id(part))
    if isinstance(part, Own):
        return part.state()
    document: Document = {}
    for name, value in vars(part).items():
        parts = _parts(value)
        if _is_data(value):
            document[name] = value
        elif parts and not any(id(item) in seen for item in parts):
            made = tuple(dump(item, seen) for item in parts)
            document[name] = made if isinstance(value, (list, tuple)) else made[0]
    return _frozen(document)


def fill(part: Any, document: Document) -> None:
    """Let `part`, which nothing was fed to, hold what was dumped."""
    if isinstance(part, Own):
        part.restore(document)
        return
    for name, value in document.items():
        held = getattr(part, name)
        parts = _parts(held)
        if parts:
            states = value if isinstance(held, (list, tuple)) else (value,)
            for item, state in zip(parts, states, strict=True):
                fill(item, state)
        else:
            setattr(part, name, list(value) if isinstance(held, list) else value)


def _parts(value: Any) -> list[Any]:
    """`value` itself, or the items of a list, if they are parts."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items if all(_is_part(item) for item in items) else []


def _is_part(value: Any) -> bool:
    return type(value).__module__.startswith(__package__ or "") and not dataclasses.is_dataclass(value)


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and _all(value.values())
    if isinstance(value, (list, tuple)):
        return _all(value)
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def _all(values: Iterable[Any]) -> bool:
    return all(_is_data(value) for value in values)


def _frozen(value: Any) -> Any:
    """Lists as tuples: what a record can hold."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
