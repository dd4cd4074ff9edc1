"""The corpora that a set of statistics needs, with the user's options."""

from __future__ import annotations

import inspect
from types import GenericAlias
from typing import Any

from kvtool import options
from kvtool.commands._console import note
from kvtool.corpus import registry as corpora
from kvtool.corpus.base import Corpus
from kvtool.errors import InputError, unknown
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


def read(settings: list[str]) -> dict[str, dict[str, Any]]:
    """["needle.lengths=500", …] → {"needle": {"lengths": (500,)}}, without a model: mistakes are told before one
    is loaded."""
    return {kind: typed(kind, values) for kind, values in scoped(settings).items()}


def build(
    model: Model, kinds: set[str], text: dict[str, Any], chosen: dict[str, dict[str, Any]], seed: int
) -> dict[str, Corpus]:
    """Corpora by kind; `text` holds the options of the text corpus, `chosen` what `read` made of the settings."""
    for kind in sorted(set(chosen) - kinds):
        note(f"note: nothing that is taken reads the {kind} corpus; its settings have no effect")
    made = {}
    for kind in sorted(kinds):
        given = {**(text if kind == "text" else {}), **chosen.get(kind, {})}
        if kind == "text" and "default" in given["sources"]:
            given.setdefault("half", "calibration")
        made[kind] = corpora.build(kind, model, **{"seed": seed, **given})
    return made


def typed(kind: str, values: dict[str, str]) -> dict[str, Any]:
    """Text values converted to what the builder's defaults are; raises InputError for an option that it lacks."""
    signature = dict(list(inspect.signature(corpora.builder(kind)).parameters.items())[1:])
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name not in signature:
            raise unknown(f"option of the {kind} corpus", name, signature)
        parameter = signature[name]
        wanted: Any = type(parameter.default)
        if isinstance(parameter.default, tuple):
            wanted = GenericAlias(tuple, (type(parameter.default[0]), ...))
        elif parameter.default is None:
            wanted = int if str(parameter.annotation).startswith("int") else str
        out[name] = options.convert(value, wanted, f"option {name} of {kind}")
    return out
