"""The corpora that a set of statistics needs, with the user's options."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from kvtool import options
from kvtool.corpus import registry as corpora
from kvtool.corpus.base import Corpus
from kvtool.errors import InputError
from kvtool.model import Model


def scoped(settings: list[str]) -> dict[str, dict[str, str]]:
    """["needle.lengths=500", …] → {"needle": {"lengths": "500"}}."""
    found: dict[str, dict[str, str]] = {}
    for key, value in options.pairs(settings).items():
        scope, dot, name = key.partition(".")
        if not dot:
            raise InputError("cannot read the setting", got=f"{key}={value}", expected="what.option=value")
        found.setdefault(scope.replace("_", "-"), {})[name] = value
    return found


def build(model: Model, kinds: set[str], text: dict[str, Any], settings: list[str], seed: int) -> dict[str, Corpus]:
    """Corpora by kind; `text` holds the options of the text corpus."""
    chosen = scoped(settings)
    for scope in chosen:
        corpora.builder(scope)
    made = {}
    for kind in sorted(kinds):
        given = {name: value for name, value in text.items()} if kind == "text" else {}
        given |= typed(kind, chosen.get(kind, {}))
        if kind == "text" and list(given["sources"]) == ["default"]:
            given.setdefault("half", "calibration")
        made[kind] = corpora.build(kind, model, **given, seed=seed)
    return made


def typed(kind: str, values: dict[str, str]) -> dict[str, Any]:
    """Text values converted to what the builder's defaults are."""
    signature = inspect.signature(corpora.builder(kind)).parameters
    out: dict[str, Any] = {}
    for name, value in values.items():
        default = signature[name].default if name in signature else value
        if isinstance(default, tuple):
            inner = type(default[0]) if default else str
            out[name] = options.convert(value, typing.cast(Any, tuple[inner, ...]), f"option {name} of {kind}")
        else:
            out[name] = options.convert(value, int if default is None else type(default), f"option {name} of {kind}")
    return out
