"""`kvtool methods`: list what there is, or explain one method."""

from __future__ import annotations

import inspect
from typing import Any

from kvtool import options, registry
from kvtool.commands._console import note, table


def run(name: str | None, what: str) -> dict[str, Any]:
    """Returns the record that `--json` prints."""
    if what == "corpus":
        from kvtool.corpus import registry as corpora  # here and below: a plain list needs no torch

        rows = []
        for kind in corpora.names():
            parameters = list(inspect.signature(corpora.builder(kind)).parameters.values())[1:]
            rows.append((kind, ", ".join(f"{p.name}={p.default}" for p in parameters)))
        table("corpora and their options", ("kind", "options"), rows)
        return {"corpora": dict(rows)}
    if name is None:
        rows = [(entry, registry.summary(what, entry)) for entry in registry.names(what)]
        table(what, ("name", "what it does"), rows)
        return {what: dict(rows)}
    module = registry.module("methods", name, "method")
    note(inspect.getdoc(module) or "")
    when = ", under some options," if hasattr(module, "reads") else ""
    needs = [f"the statistics {', '.join(module.STATISTICS)}{when}"] if module.STATISTICS else []
    needs += ["the model itself"] if module.MODEL else []
    note(f"\nNeeds {' and '.join(needs) or 'only the geometry of a model'}.\n")
    described = options.describe(module.Options)
    table("options (--set name=value)", ("name", "default", "meaning"), described)
    name, needed = registry.spelled(name), list(module.STATISTICS)
    return {"method": name, "statistics": needed, "model": module.MODEL, "options": described}
