"""Options dataclasses from text: `--set key=value` and YAML values become typed fields, and fields become help rows.

Field types: int, float, bool, str, Literal, and tuples of the first four ("1000,2000").
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from inspect import cleandoc
from typing import Any

from kvtool.errors import InputError, unknown

TRUTH = dict.fromkeys(("true", "yes", "1", "on"), True) | dict.fromkeys(("false", "no", "0", "off"), False)
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


def pairs(settings: list[str]) -> dict[str, str]:
    """["a=1", "b=2"] → {"a": "1", "b": "2"}; dashes in keys become underscores."""
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise InputError("cannot read the setting", got=repr(setting), expected="key=value")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def build(cls: type, values: Mapping[str, Any], what: str) -> Any:
    """An instance of the dataclass `cls`; raises InputError for a field that it lacks or a value of another type."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise unknown(f"option of {what}", key, known)
    return cls(**{key: convert(value, hints[key], f"option {key} of {what}") for key, value in values.items()})


def convert(value: Any, kind: Any, what: str) -> Any:
    """Text (or a YAML value) to the type `kind`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        parts = value if isinstance(value, (list, tuple)) else [part for part in str(value).split(",") if part.strip()]
        if not parts:
            raise InputError(f"bad {what}", got=repr(value), expected="one value or more, like 1,2")
        return tuple(convert(part, inner[0], what) for part in parts)
    if origin is typing.Literal:
        if value not in inner:
            raise unknown(f"value of {what}", str(value), [str(choice) for choice in inner])
        return value
    if kind is bool:
        if str(value).lower() in TRUTH:
            return TRUTH[str(value).lower()]
    else:
        try:
            made = kind(value.strip() if isinstance(value, str) else value)
            if kind is str or (math.isfinite(made) and (isinstance(value, str) or made == value)):
                return made
        except (ValueError, TypeError, OverflowError):
            pass
    raise InputError(f"bad {what}", got=repr(value), expected=WORDS.get(kind, f"a value of type {kind.__name__}"))


def at_least(low: int, options: Any, *names: str) -> None:
    """Raise InputError unless these fields of an options dataclass, or each of their items, are `low` or more."""
    for name in names:
        value = getattr(options, name)
        if min(value if isinstance(value, tuple) else (value,), default=low) < low:
            raise InputError(f"bad option {name}", got=record(options)[name], expected=f"{low} or more")


def record(options: Any) -> dict[str, Any]:
    """Options as recorded in a plan (JSON-able)."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}


def describe(cls: type) -> list[tuple[str, str, str]]:
    """(name, default, help) per field; help is the sentence of the class docstring that names the field."""
    sentences = {}
    text = " ".join(cleandoc(cls.__doc__ or "").split())
    for names, sentence in re.findall(r"(?:^|(?<=\. ))((?:\w+, )*\w+): (.*?)(?=\. (?:\w+, )*\w+: |$)", text):
        for name in names.split(", "):
            sentences[name] = sentence.rstrip(".")
    rows = []
    for field in fields(cls):
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        rows.append((field.name, default, sentences.get(field.name, "")))
    return rows
