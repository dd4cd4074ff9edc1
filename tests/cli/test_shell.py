"""Commands joined in a real shell: by substitution, by pipes, and with a reader that leaves."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.terminal import Ran, files, shell
from tests.cli.tiny import RAZOR, TEXT


def line(command: str, model: Path) -> str:
    return command.format(model=shlex.quote(str(model)), razor=shlex.join(RAZOR), text=shlex.join(TEXT))


@pytest.fixture(scope="module")
def substituted(shelf: Path, model: Path) -> tuple[Path, Ran]:
    """The folder it ran in, and how it went."""
    folder = shelf / "substituted"
    folder.mkdir()
    inner = "$(kvtool calibrate --method razor $(kvtool profile {model} {razor}) --set recent=32)"
    return folder, shell(line("kvtool replay {model} --plan " + inner + " {text} --json", model), folder)


def test_substitution_hands_over_paths(substituted: tuple[Path, Ran]) -> None:
    folder, ran = substituted
    assert ran.fine().document["kind"] == "verdict"
    assert files(folder) == {"tiny-llama.trace.safetensors", "tiny-llama.razor.plan.safetensors"}


def test_pipes_hand_over_the_files_themselves(substituted: tuple[Path, Ran], model: Path, tmp_path: Path) -> None:
    command = (
        "kvtool profile {model} {razor} -o - | kvtool calibrate --method razor - --set recent=32 -o - "
        "| kvtool replay {model} --plan - {text} --json"
    )
    assert shell(line(command, model), tmp_path).fine().document == substituted[1].document
    assert not files(tmp_path)


def test_a_failure_ends_the_pipe(tmp_path: Path) -> None:
    ran = shell("kvtool inspect nowhere | kvtool inspect -", tmp_path)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, b"", 2)
    assert "no such file: got nowhere" in ran.err
    assert "nothing came on stdin" in ran.err


def test_a_closed_stdout(plan: Path, tmp_path: Path) -> None:
    ran = shell(f"kvtool inspect {shlex.quote(str(plan))} >&-", tmp_path).fine()
    assert ran.err.splitlines()[0].endswith(" B") or "a plan" in ran.err


@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_a_reader_that_leaves(reader: str, trace: Path, tmp_path: Path) -> None:
    ran = shell(f"kvtool inspect {shlex.quote(str(trace))} --json 2>log | {reader}", tmp_path)
    assert ran.out in (b"", b"{")
    assert not {"Traceback", "Error", "Exception"} & set((tmp_path / "log").read_text().replace(":", " ").split())
