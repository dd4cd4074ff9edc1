"""Ctrl-C in the middle, and --resume: the file at the end is the file of an undisturbed run, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.terminal import ENVIRONMENT, Ran, files, kv
from tests.cli.tiny import PROFILE

TRACE = ("--stat", "channels", "--stat", "induction", "--tokens", "512", "--samples", "40", "--set", "repeat.samples=2")
RAW = ("--raw", "k", "--layers", "0", "--raw-tokens", "8")
DUO = ("--method", "duo", "--steps", "60", "--lengths", "200", "--set", "passkeys=1", "--set", "patience=29")


def interrupted(arguments: list[str], folder: Path, begun: Callable[[], bool]) -> Ran:
    """Run kvtool in a process of its own and send SIGINT as soon as `begun`."""
    command = [shutil.which("kvtool", path=ENVIRONMENT["PATH"]) or "kvtool", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not begun() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Ran(process.returncode, out, err.decode())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_profile(model: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    kv("profile", model, "-o", whole / "t.trace", *TRACE, *RAW).fine()
    arguments = ["profile", str(model), "-o", "t.trace", *TRACE, *RAW]  # sample 6 is in the second packed row
    ran = interrupted(arguments, parted, (parted / "t.raw" / "sample-0006").exists)
    assert (ran.code, ran.out) == (130, b"")
    assert ran.err.splitlines()[-1] == "kvtool: interrupted"
    assert "--resume" in ran.err

    seen = kv("inspect", parted / "t.trace", "--json").fine().document
    assert not seen["complete"]
    assert 4 <= len(seen["done"]["text"]) < 40
    assert not [name for name in files(parted) if name.endswith(".part")]
    kv("profile", model, "-o", parted / "t.trace", *TRACE, *RAW).refused("exists already")
    kv("profile", model, "-o", parted / "t.trace", *TRACE, *RAW, "--resume").fine()
    assert contents(parted) == contents(whole)


def test_a_complete_profile_resumes_to_itself(model: Path, trace: Path, here: Path) -> None:
    copy = here / "again.trace"
    copy.write_bytes(trace.read_bytes())
    kv("profile", model, "-o", copy, *PROFILE, "--resume").fine()
    assert copy.read_bytes() == trace.read_bytes()


def test_resume_without_a_file_begins(model: Path, trace: Path, here: Path) -> None:
    kv("profile", model, "-o", "new.trace", *PROFILE, "--resume").fine()
    assert (here / "new.trace").read_bytes() == trace.read_bytes()


def test_calibrate(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "duo.plan"
    state = tmp_path / "duo.plan.part"
    ran = interrupted(["calibrate", str(model), "-o", "duo.plan", *DUO], tmp_path, state.exists)
    assert (ran.code, ran.out) == (130, b"")
    assert ran.err.splitlines()[-1] == "kvtool: interrupted"
    assert files(tmp_path) == {state.name}
    assert kv("inspect", state, "--json").fine().document["kind"] == "checkpoint"

    kv("calibrate", model, "-o", plan, *DUO, "--resume").fine()
    assert files(tmp_path) == {plan.name}
    whole = kv("calibrate", model, "-o", tmp_path / "whole.plan", *DUO, "--json").fine().document
    assert 29 < whole["facts"]["steps"] < 60  # it stopped early, and so did the one that was interrupted
    assert plan.read_bytes() == (tmp_path / "whole.plan").read_bytes()


def test_without_resume_a_calibration_begins_anew(model: Path, here: Path) -> None:
    (here / "duo.plan.part").write_bytes(b"of another time")
    kv("calibrate", model, "-o", "duo.plan", *DUO, "--steps", "2").fine()
    assert files(here) == {"duo.plan"}


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_interrupts_leave_with_130(debug: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtool.commands.methods.run", stop)
    kv(*debug, "methods").refused("interrupted", code=130)
