"""The kinds of corpus by name. This folder is the registry: a file that is not a helper holds one builder.

A builder is a function with the name of its file, `builder(model, *, options) -> Corpus`. Listing imports
nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import unknown

if TYPE_CHECKING:
    from kvtool.corpus.base import Corpus
    from kvtool.model import Model

HELPERS = {"__init__", "base", "default", "haystack", "registry", "shelves", "sources"}
TYPED = {"twohop": "two-hop"}  # where the kind's name is no module name


def names() -> list[str]:
    """Every kind, as the user types it."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(TYPED.get(stem, stem) for stem in stems if stem not in HELPERS)


def builder(name: str) -> Callable[..., Corpus]:
    """The function that makes corpora of the kind `name`; dashes and underscores are the same."""
    stems = {kind.replace("-", ""): kind for kind in names()}
    stem = name.replace("-", "").replace("_", "")
    if stem not in stems:
        raise unknown("kind of corpus", name, names())
    return getattr(importlib.import_module(f"kvtool.corpus.{stem}"), stem)


def build(name: str, model: Model, **options: Any) -> Corpus:
    """The corpus of kind `name`. Raises InputError for a kind or an option that there is not."""
    build = builder(name)
    known = list(inspect.signature(build).parameters)[1:]
    for option in options:
        if option not in known:
            raise unknown(f"option of the {name} corpus", option, known)
    return build(model, **options)
