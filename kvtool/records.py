"""Records: frozen dataclasses that a file can hold. Scalars go to the JSON header, tensors to safetensors.

    @dataclass(frozen=True)
    class Affine(Record): bits: int; group: int

    dump(value, "store") → JSON, {"store.scale": tensor, ...};   load(JSON, tensors) → value

A record may hold scalars, None, tensors, records, and tuples and dictionaries (with names as keys) of these. The name
of its class is its kind in the file; the set of kinds is closed: it is the classes of this package that derive from
Record. It knows none of them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch

Tensors = dict[str, torch.Tensor]


class Record:
    """Base of everything that a slot of a plan is made of."""

    kinds: ClassVar[dict[str, type[Record]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = Record.kinds.get(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"{cls.__module__} and {known.__module__} both define a record {cls.__name__}")
        Record.kinds[cls.__name__] = cls


def dump(value: Any, name: str, tensors: Tensors) -> Any:
    """JSON of `value`; its tensors are added to `tensors` under names that begin with `name`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Record):
        names = [field.name for field in fields(value)]  # type: ignore[arg-type]
        inner = {field: dump(getattr(value, field), f"{name}.{field}", tensors) for field in names}
        return {"kind": type(value).__name__, **inner}
    if isinstance(value, tuple):
        return [dump(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"items": {key: dump(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a record cannot hold {type(value).__name__}")


def load(document: Any, tensors: Tensors) -> Any:
    """The value that `dump` made `document` from; raises KeyError or TypeError when it is damaged."""
    if isinstance(document, list):
        return tuple(load(item, tensors) for item in document)
    if not isinstance(document, dict):
        return document
    if document.keys() == {"tensor"}:
        return tensors[document["tensor"]]
    if document.keys() == {"items"}:
        return {name: load(item, tensors) for name, item in document["items"].items()}
    kind = Record.kinds[document["kind"]]
    return kind(**{name: load(item, tensors) for name, item in document.items() if name != "kind"})


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor in `value`, for byte counts."""
    found: Tensors = {}
    dump(value, "value", found)
    return list(found.values())


def alike(one: Any, other: Any) -> bool:
    """Would a file hold the same of both?"""
    tensors: tuple[Tensors, Tensors] = ({}, {})
    mine, theirs = (dump(value, "value", found) for value, found in zip((one, other), tensors, strict=True))
    same = mine == theirs and tensors[0].keys() == tensors[1].keys()
    return same and all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())


def settled(value: Any) -> Any:
    """`value` as a file would give it back: with tensors of its own, laid out in order."""
    found: Tensors = {}
    document = dump(value, "value", found)
    return load(document, {name: tensor.contiguous() for name, tensor in found.items()})
