"""Fixtures for every test: one thread, a seed, and the tiny models."""

from __future__ import annotations

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

from kvtool.model import Model
from tests import models

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=models.ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Model:
    """Each of the five architectures."""
    return models.shared(request.param)


@pytest.fixture(scope="session", params=models.EVERY)
def any_model(request: pytest.FixtureRequest) -> Model:
    """The five architectures and the corner cases of attention."""
    return models.shared(request.param)


@pytest.fixture(scope="session")
def llama() -> Model:
    return models.shared("llama")


@pytest.fixture(scope="session")
def induction() -> Model:
    return models.induction_model()
