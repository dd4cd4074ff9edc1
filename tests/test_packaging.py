"""What is installed: the wheel's contents, the version, the dependencies and their reasons, a light start."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import kvtool

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"accelerate", "gguf", "matplotlib", "numpy", "scipy", "torch", "transformers", "triton"}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(requirement).name for requirement in requirements}


def reasons() -> dict[str, set[str]]:
    """Section of docs/dependencies.md → the packages in its table."""
    text = (ROOT / "docs/dependencies.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    rows = re.compile(r"^\| (?!package )(\S+) \|", re.MULTILINE)
    return {section.splitlines()[0]: set(rows.findall(section)) for section in sections}


PACKAGES = {"yaml": "pyyaml"}  # where the import's name is not the package's


def imported() -> set[str]:
    """Top-level names of the absolute imports anywhere in the two packages."""
    found = set()
    for path in [*ROOT.glob("kvtool/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {PACKAGES.get(name, name) for name in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    built = next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_wheel_holds_two_packages_and_nothing_else(wheel: set[str]):
    metadata = f"kvtool-{kvtool.__version__}.dist-info"
    assert {path.partition("/")[0] for path in wheel} == {"kvtool", "kvtool_kernels", metadata}


def test_wheel_holds_every_module(wheel: set[str]):
    modules = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("kvtool/**/*.py")}
    modules |= {p.relative_to(ROOT / "kernels").as_posix() for p in ROOT.glob("kernels/**/*.py")}
    assert modules <= wheel


def test_wheel_holds_the_calibrations(wheel: set[str]):
    here = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("calibrations/**/*") if p.is_file()}
    assert here
    assert {f"kvtool/{path}" for path in here} <= wheel


def test_kernels_is_a_folder_and_no_package():
    """transformers imports a package called `kernels` when there is one."""
    assert (ROOT / "kernels" / "kvtool_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_that_of_the_package():
    assert importlib.metadata.version("kvtool") == kvtool.__version__


def test_changelog_names_the_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == kvtool.__version__


def test_each_dependency_has_its_reason():
    documented = reasons()
    development = documented.pop("Development")
    assert set().union(*documented.values()) == names(PROJECT["dependencies"])
    assert development == names(PROJECT["optional-dependencies"]["dev"])


def test_each_dependency_is_imported_here_or_by_another_package():
    documented = reasons()
    assert names(PROJECT["dependencies"]) - imported() == documented["Imported by another package"]


def test_each_dependency_is_pinned():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)  # exact, and without a local part
    wanted = names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert wanted <= {line.partition("==")[0] for line in lines}


def test_help_starts_light():
    command = [sys.executable, "-X", "importtime", "-m", "kvtool", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Usage" in run.stdout
    timings = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in timings}
    assert "kvtool.cli" in loaded
    assert not HEAVY & {name.partition(".")[0] for name in loaded}
