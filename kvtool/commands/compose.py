"""`kvtool compose`: plans that fill different slots → one plan."""

from __future__ import annotations

from typing import Any

from kvtool import files, plan
from kvtool.commands._shelf import find
from kvtool.errors import InputError


def run(paths: list[str], output: str, force: bool) -> dict[str, Any]:
    """Returns the record that `--json` prints."""
    files.check_output(output, force=force)
    if len(paths) < 2:
        raise InputError("nothing to compose", got=f"{len(paths)} plan", expected="two or more")
    files.one_stdin(*paths)
    joined = plan.compose(*[plan.read(find(path)) for path in paths])
    joined.write(output, force=force)
    return {"output": output, "kind": "plan", "method": joined.method, "slots": joined.slots}
