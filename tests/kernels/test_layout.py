"""Every operation has a reference, a spec, and a place in the dispatch; every twin keeps the reference's signature."""

from __future__ import annotations

import importlib
import inspect

import pytest

from kvtool_kernels import ops
from tests.kernels.twins import OPERATIONS, ROOT, names, reference, twin


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_whole(operation: str) -> None:
    assert operation in ops.__all__
    importlib.import_module(f"kvtool_kernels.{operation}.spec")
    expected = inspect.signature(reference(operation)).parameters
    for function in (getattr(ops, operation), *(twin(operation, name) for name in names(operation))):
        assert list(inspect.signature(function).parameters) == list(expected)


def test_no_folder_lacks_a_reference() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == set(OPERATIONS)
