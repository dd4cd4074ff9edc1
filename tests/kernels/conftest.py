"""Triton's interpreter, made quicker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

try:
    from triton.runtime import interpreter
except ImportError:  # Triton has wheels on Linux only
    interpreter = None


@pytest.fixture(scope="session", autouse=True)
def patched_once() -> Iterator[None]:
    """The interpreter patches the modules that a device function sees at each of its calls; the first is enough."""
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = self.fn.__globals__
        if id(seen) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(seen))
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if interpreter is not None:
            patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
