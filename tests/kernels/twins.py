"""Every fast twin of every operation: the modules beside its reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvtool_kernels

ROOT = Path(kvtool_kernels.__file__).parent
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("*/reference.py"))
PLAIN = {"__init__", "reference", "spec"}


def names(operation: str) -> list[str]:
    """Module names of the twins of one operation."""
    return sorted(path.stem for path in (ROOT / operation).glob("*.py") if path.stem not in PLAIN)


def twin(operation: str, name: str) -> Callable[..., Any]:
    """The function of one twin. Triton runs on the GPU, interpreted where there is none (tests/conftest.py)."""
    if name == "triton":
        pytest.importorskip("triton")
    return getattr(importlib.import_module(f"kvtool_kernels.{operation}.{name}"), operation)


def reference(operation: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"kvtool_kernels.{operation}.reference"), operation)


def device(name: str) -> str:
    return "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
