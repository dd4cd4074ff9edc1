"""Triton's interpreter, made quicker."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def patched_once() -> Any:
    """The interpreter patches `triton.language` for each call of a device function; its kernel's call has done so."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    function = interpreter.InterpretedFunction
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
        yield
