"""What a slot of a plan says, a line for each record in it, without what is the default.

store         Store(index [30,3], recent=128, block=128)
store.keys.0  Affine(bits=4, group=32, axis=token)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvtool import slots  # noqa: F401  whose records are known once it is imported
from kvtool.records import Record

Lines = list[tuple[str, str]]


def outline(name: str, document: Any, shapes: dict[str, list[int]]) -> Lines:
    """Lines for the JSON of one slot, as `records.dump` made it; `shapes` of the file's tensors."""
    if document is None:
        return []
    lines = _record(name, document, shapes)
    found: Lines = []
    for line in lines:
        if found and line[1] == found[-1][1] and line[0].rpartition(".")[2].isdigit():
            found[-1] = (f"{found[-1][0].partition(' ')[0]} … {line[0].rpartition('.')[2]}", line[1])
        else:
            found.append(line)
    return found


def _record(name: str, document: dict[str, Any], shapes: dict[str, list[int]]) -> Lines:
    kind = document["kind"]
    usual = {field.name: _usual(field) for field in dataclasses.fields(Record.kinds[kind])}  # type: ignore[arg-type]
    said, inner = [], []
    for field, default in usual.items():
        value = document.get(field, default)  # written before there was such a field
        if value == default:
            continue
        if _is_record(value):
            inner += _record(f"{name}.{field}", value, shapes)
        elif isinstance(value, list) and value and all(_is_record(item) for item in value):
            inner += [line for at, item in enumerate(value) for line in _record(f"{name}.{field}.{at}", item, shapes)]
        else:
            said.append(_value(field, value, shapes))
    own = [(name, f"{kind}({', '.join(said)})")] if said or not inner else []
    return [*own, *inner]


def _usual(field: Any) -> Any:
    """A field's default as JSON, or a thing that no JSON equals."""
    default = field.default if field.default is not dataclasses.MISSING else ...
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, Record):
        return {"kind": type(default).__name__, **{one.name: _usual(one) for one in dataclasses.fields(default)}}  # type: ignore[arg-type]
    return list(default) if isinstance(default, tuple) else {"items": default} if isinstance(default, dict) else default


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and "kind" in value


def _value(field: str, value: Any, shapes: dict[str, list[int]]) -> str:
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        return f"{field} {shapes[value['tensor']]}".replace(", ", ",")
    if isinstance(value, dict):
        inner = value.get("items", value)
        return f"{field}={{{', '.join(_value(key, item, shapes) for key, item in inner.items())}}}"
    return f"{field}={value}"
