"""What a method's mode needs: one that leaves the choice to each prompt needs no trace and no model."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from kvtool import registry
from kvtool.calibrate import calibrate, method, reads
from kvtool.errors import InputError
from kvtool.methods._base import Context
from tests import models
from tests.laws.methods import trace


def modes(name: str) -> tuple[str, ...]:
    """The values of a method's option `mode`."""
    found: tuple[str, ...] = get_args(get_type_hints(method(name).Options).get("mode"))
    return found


PROMPT = [name for name in registry.names("methods") if "prompt" in modes(name) and not method(name).MODEL]
FREE = [*((name, "prompt") for name in PROMPT), ("mpcache", "fixed")]
MEASURED = [name for name, _ in FREE if "calibrated" in modes(name)]


@pytest.mark.parametrize(("name", "mode"), FREE)
def test_the_geometry_is_enough(name: str, mode: str) -> None:
    module: Any = method(name)
    options = module.Options(mode=mode)
    assert reads(module, options) == ()
    made = module.calibrate(Context(models.shared("llama").geometry), options)
    assert any(slot is not None for slot in (made.keep, made.store, made.read))


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_missing_is_asked_for(name: str) -> None:
    """Of a trace that lacks what is read, or of one without the model that would have to run."""
    seen = trace(models.shared("llama"), ("residual",))
    with pytest.raises(InputError):
        calibrate(name, {"mode": "calibrated"}, trace=seen)
