"""The one error class for bad input, and how its message is put together.

A message says what was expected, what came instead, and what to do. The command line prints it as one line on
stderr and exits with code 2; a library user catches `InputError`. `assert` is kept for impossible states.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad usage or bad input: `InputError(what, got=..., expected=..., remedy=...)`.

    All parts but `what` are optional; the text reads "what: got X, expected Y. Remedy."
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None):
        facts = []
        if got is not None:
            facts.append(f"got {got}")
        if expected is not None:
            facts.append(f"expected {expected}")
        text = what + (": " + ", ".join(facts) if facts else "")
        if remedy:
            text += ". " + remedy[0].upper() + remedy[1:]
        super().__init__(text if text.endswith(("?", ".")) else text + ".")


class RunError(RuntimeError):
    """The run itself failed, or a `--fail-if` bound was broken: exit code 1."""


MANY = 20  # names that are not listed when one of them is near


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that no registry holds, with the nearest known name as the remedy."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else None
    listed = None if near and len(known) > MANY else "one of " + ", ".join(known)
    return InputError(f"unknown {kind}", got=repr(name), expected=listed, remedy=remedy)
