"""A tiny model in a folder with a space, and one trace and two plans made of it, all by the command line itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.terminal import ENVIRONMENT, kv
from tests.cli.tiny import PROFILE, RAZOR, save


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    """A name that is no folder is not looked for on the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", ENVIRONMENT["HF_HUB_OFFLINE"])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of the whole session lie; its path has a space."""
    return tmp_path_factory.mktemp("two words")


@pytest.fixture(scope="session")
def model(shelf: Path) -> Path:
    return save(shelf / "tiny llama")


@pytest.fixture(scope="session")
def trace(shelf: Path, model: Path) -> Path:
    """Every usual statistic."""
    path = shelf / "every statistic.trace"
    kv("profile", model, "-o", path, *PROFILE).fine()
    return path


@pytest.fixture(scope="session")
def induction(shelf: Path, model: Path) -> Path:
    """A trace with what razor needs, and nothing else."""
    path = shelf / "induction.trace"
    kv("profile", model, "-o", path, *RAZOR).fine()
    return path


@pytest.fixture(scope="session")
def second(shelf: Path, model: Path) -> Path:
    """The same of other samples."""
    path = shelf / "second.trace"
    kv("profile", model, "-o", path, *RAZOR, "--seed", "1").fine()
    return path


@pytest.fixture(scope="session")
def plan(shelf: Path, induction: Path) -> Path:
    """A lossy plan by razor: half of the heads keep 32 entries."""
    path = shelf / "razor.plan"
    kv("calibrate", induction, "--method", "razor", "--set", "induction=0.5", "--set", "recent=32", "-o", path).fine()
    return path


@pytest.fixture(scope="session")
def lossless(shelf: Path, induction: Path) -> Path:
    """A plan in which all heads keep everything."""
    path = shelf / "full.plan"
    kv("calibrate", induction, "--method", "razor", "--set", "induction=1", "-o", path).fine()
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
