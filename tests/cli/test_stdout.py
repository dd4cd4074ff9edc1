"""Stdout carries data only: the path of what was written, the file itself, or one JSON document."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.cli.terminal import Ran, files, kv
from tests.cli.tiny import DUO, RAZOR, REPLAY

OUT = "out put.safetensors"


@pytest.fixture
def command(
    request: pytest.FixtureRequest, model: Path, trace: Path, induction: Path, second: Path, plan: Path, lossless: Path,
    here: Path,
) -> list[object]:  # fmt: skip
    """One command line by name; those that write write to OUT."""
    return {
        "profile": ["profile", model, "-o", OUT, *RAZOR],
        "merge": ["merge", trace, second, "-o", OUT],
        "analyze": ["analyze", trace, "heads"],
        "calibrate": ["calibrate", induction, "--method", "razor", "-o", OUT],
        "calibrate-model": ["calibrate", model, "--method", "duo", *DUO, "-o", OUT],
        "compose": ["compose", plan, lossless, "-o", OUT],
        "replay": ["replay", model, "--plan", plan, *REPLAY],
        "replay-written": ["replay", model, "--plan", plan, *REPLAY, "-o", OUT],
        "inspect": ["inspect", plan],
        "methods": ["methods"],
        "methods-one": ["methods", "razor"],
        "methods-probes": ["methods", "--probes"],
        "methods-statistics": ["methods", "--statistics"],
    }[request.param]


WRITING = ["profile", "merge", "calibrate", "calibrate-model", "compose", "replay-written"]
SILENT = ["analyze", "replay", "inspect", "methods", "methods-one", "methods-probes", "methods-statistics"]


@pytest.mark.parametrize("command", [*WRITING, *SILENT], indirect=True)
def test_json_is_one_document(command: list[object]) -> None:
    ran = kv(*command, "--json").fine()
    assert isinstance(ran.document, dict)
    assert ran.out.count(b"\n") == 1


@pytest.mark.parametrize("command", WRITING, indirect=True)
def test_the_path_and_nothing_else(command: list[object], here: Path) -> None:
    assert kv(*command).fine().out.decode() == f"{OUT}\n"
    assert files(here) == {OUT}


@pytest.mark.parametrize("command", SILENT, indirect=True)
def test_nothing_where_nothing_was_written(command: list[object], here: Path) -> None:
    ran = kv(*command).fine()
    assert ran.out == b""
    assert ran.err
    assert not files(here)


def test_names_by_default(model: Path, here: Path) -> None:
    trace = kv("profile", model, *RAZOR).fine().text
    assert kv("calibrate", trace, "--method", "razor").fine().text == "tiny-llama.razor.plan.safetensors"
    assert files(here) == {trace, "tiny-llama.razor.plan.safetensors"}


def test_a_method_has_one_name_however_it_is_typed(model: Path, here: Path) -> None:
    assert kv("calibrate", model, "--method", "SnapKV").fine().text == "tiny-llama.snapkv.plan.safetensors"
    assert kv("inspect", "tiny-llama.snapkv.plan.safetensors", "--json").document["method"] == "snapkv"
    assert kv("methods", "Expected_Attention", "--json").fine().document["method"] == "expected-attention"


def test_the_same_bytes_on_stdout(
    model: Path, induction: Path, second: Path, plan: Path, lossless: Path, here: Path
) -> None:
    settings = ("--method", "razor", "--set", "induction=0.5", "--set", "recent=32")
    assert kv("profile", model, *RAZOR, "-o", "-").fine().out == induction.read_bytes()
    assert kv("calibrate", induction, *settings, "-o", "-").fine().out == plan.read_bytes()
    assert kv("calibrate", "-", *settings, "-o", "-", stdin=induction.read_bytes()).fine().out == plan.read_bytes()
    kv("compose", plan, lossless, "-o", "both.plan").fine()
    assert kv("compose", plan, lossless, "-o", "-").fine().out == Path("both.plan").read_bytes()
    kv("merge", induction, second, "-o", "sum.trace").fine()
    assert kv("merge", induction, second, "-o", "-").fine().out == Path("sum.trace").read_bytes()


@pytest.mark.parametrize("command", ["profile", "merge", "calibrate", "compose"], indirect=True)
def test_two_things_cannot_share_stdout(command: list[object], here: Path) -> None:
    kv(*["-" if part == OUT else part for part in command], "--json").refused("stdout")
    assert not files(here)


def test_a_verdict_on_stdout_is_its_json(model: Path, plan: Path, here: Path) -> None:
    task = ("--tasks", "generation", "--set", "generation.prompt=64", "--set", "generation.tokens=4")
    documents = [kv("replay", model, "--plan", plan, *task, *how).fine().document for how in (["-o", "-"], ["--json"])]
    assert kv("replay", model, "--plan", plan, *task, "-o", "-", "--json").fine().document == documents[0]
    assert documents[0] == documents[1]


def test_stdin_is_a_file_like_any_other(trace: Path, plan: Path) -> None:
    for path in (trace, plan):
        there = kv("inspect", path, "--json").fine().document
        assert kv("inspect", "-", "--json", stdin=path.read_bytes()).fine().document == {**there, "file": "-"}


def test_text_from_stdin(model: Path, here: Path) -> None:
    (here / "a text.txt").write_text("All work and no play. " * 40)
    options = ("--tokens", "32", "--samples", "2", "--stat", "channels")
    kv("profile", model, "--text", "a text.txt", *options, "-o", "file.trace").fine()
    stdin = (here / "a text.txt").read_bytes()
    kv("profile", model, "--text", "-", *options, "-o", "stdin.trace", stdin=stdin).fine()
    hashes = [
        kv("inspect", f"{name}.trace", "--json").document["corpora"]["text"][0]["hash"] for name in ("file", "stdin")
    ]
    assert hashes[0] == hashes[1]


def test_a_pipe_is_read(induction: Path, plan: Path) -> None:
    """As `kvtool calibrate <(command)` does it."""
    read, write = os.pipe()
    os.write(write, induction.read_bytes())
    os.close(write)
    settings = ("--method", "razor", "--set", "induction=0.5", "--set", "recent=32")
    ran: Ran = kv("calibrate", f"/dev/fd/{read}", *settings, "-o", "-").fine()
    os.close(read)
    assert ran.out == plan.read_bytes()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_device_is_written_to_and_never_replaced(force: tuple[str, ...], induction: Path) -> None:
    assert kv("calibrate", induction, "--method", "razor", "-o", "/dev/null", *force).fine().text == "/dev/null"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_force_overwrites(induction: Path, plan: Path, here: Path) -> None:
    Path("a.plan").write_text("something of value")
    kv("calibrate", induction, "--method", "razor", "-o", "a.plan").refused("a.plan exists already", "--force")
    assert Path("a.plan").read_text() == "something of value"
    kv("calibrate", induction, "--method", "razor", "-o", "a.plan", "--force").fine()
    assert kv("inspect", "a.plan", "--json").document["kind"] == "plan"
