"""`--help`: every command has an example, every argument and option its explanation."""

from __future__ import annotations

from typing import Any

import pytest
import typer

import kvtool
from kvtool.cli import app
from tests.cli.terminal import kv

GROUP: Any = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_of_the_program(flag: str) -> None:
    text = kv(flag).fine().text
    assert "kvtool replay smollm2 --plan $(kvtool calibrate" in text
    for command in COMMANDS:
        assert f"  {command} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_of_a_command(command: str) -> None:
    ran = kv(command, "--help").fine()
    assert f"Usage: kvtool {command}" in ran.text
    assert f"kvtool {command} " in ran.text.partition("Example")[2]
    assert ran.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_everything_is_explained(command: str) -> None:
    assert [entry.name for entry in GROUP.commands[command].params if not entry.help] == []


def test_nothing_asked_is_a_mistake_that_gets_the_help() -> None:
    ran = kv()
    assert (ran.code, ran.out) == (2, b"")
    assert ran.err.startswith("Usage: kvtool ")


def test_version() -> None:
    assert kv("--version").fine().text == kvtool.__version__
