"""Every operation has a reference, a spec, and a place in the dispatch; every twin keeps the reference's signature."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from kvtool_kernels import ops
from tests.kernels.twins import OPERATIONS, ROOT, names


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_whole(operation: str) -> None:
    """A folder holds the function of its name, or those that its spec names; a twin need not have all of them."""
    spec = importlib.import_module(f"kvtool_kernels.{operation}.spec")
    for function in getattr(spec, "FUNCTIONS", (operation,)):
        assert function in ops.__all__
        expected = inspect.signature(getattr(module(operation, "reference"), function)).parameters
        assert list(inspect.signature(getattr(ops, function)).parameters) == list(expected)
        for name in names(operation):
            twin = getattr(module(operation, name), function, None)
            assert twin is None or list(inspect.signature(twin).parameters) == list(expected)


def test_no_folder_lacks_a_reference() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == set(OPERATIONS)


def module(operation: str, name: str) -> ModuleType:
    if name == "triton":
        pytest.importorskip("triton", reason="Triton has wheels on Linux only")
    return importlib.import_module(f"kvtool_kernels.{operation}.{name}")
