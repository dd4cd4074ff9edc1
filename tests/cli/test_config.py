"""`--config FILE.yaml`, what stands on the command line, and the spelling of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtool.cli import _options
from kvtool.config import expand
from tests.cli.terminal import kv
from tests.cli.tiny import RAZOR

FILE = """
seed: 3
force: true
profile:
  tokens: 64
  raw_tokens: 8
  for: [razor, duo]
  set: {needle: {lengths: [300, 400]}, repeat.samples: 2}
merge: {force: false}
replay:
  tasks: [text, speed]
  fail-if: ['kl>1', recall<0.5]
  output:
calibrate:
"""


def expanded(line: str, folder: Path, text: str = FILE) -> list[str]:
    (folder / "c.yaml").write_text(text)
    return expand(["--config", str(folder / "c.yaml"), *line.split()], _options)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("merge a b", "merge a b"),
        ("inspect a", "inspect a"),
        ("calibrate a", "calibrate --seed=3 --force a"),
        ("calibrate a --seed 4", "calibrate --force a --seed 4"),
        ("calibrate a --seed=4", "calibrate --force a --seed=4"),
        ("replay a", "replay --seed=3 --force --tasks=text,speed --fail-if=kl>1 --fail-if=recall<0.5 a"),
        ("replay a --fail_if x<1 --tasks=text", "replay --seed=3 --force a --fail-if x<1 --tasks=text"),
        ("nonsense a", "nonsense a"),
        ("", ""),
        ("--help", "--help"),
    ],
)
def test_expanded(line: str, expected: str, tmp_path: Path) -> None:
    assert expanded(line, tmp_path) == expected.split()


def test_settings_are_joined_key_by_key(tmp_path: Path) -> None:
    expected = (
        "profile --seed=3 --force --tokens=64 --raw-tokens=8 --for=razor --for=duo "
        "--set=needle.lengths=300,400 --set=repeat.samples=2 a --set repeat.samples=1"
    )
    assert expanded("profile a --set repeat.samples=1", tmp_path) == expected.split()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_file_may_be_named_anywhere(place: int, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3")
    for spelling in ([f"--config={tmp_path}/c.yaml"], ["--config", f"{tmp_path}/c.yaml"]):
        words = ["calibrate", "a"]
        words[place:place] = spelling
        assert expand(words, _options) == ["calibrate", "--seed=3", "a"]


def test_dashes_and_underscores() -> None:
    def unused() -> Any:
        pytest.fail("no configuration was named")

    spelled = [
        "profile",
        "my_model",
        "--raw_tokens",
        "3",
        "--raw_tokens=a_b",
        "--set",
        "needle.my_key=1",
        "--",
        "--a_b",
    ]
    expected = [
        "profile",
        "my_model",
        "--raw-tokens",
        "3",
        "--raw-tokens=a_b",
        "--set",
        "needle.my_key=1",
        "--",
        "--a_b",
    ]
    assert expand(spelled, unused) == expected


def test_the_command_line_wins(model: Path, here: Path) -> None:
    Path("my config.yaml").write_text("profile: {for: razor, seed: 5, set: {repeat: {period: 20, samples: 3}}}")
    kv("--config", "my config.yaml", "profile", model, "-o", "file.trace").fine()
    kv(
        "profile", model, "--config", "my config.yaml", "-o", "mixed.trace", "--seed", "0", "--set", "repeat.samples=1"
    ).fine()
    kv("profile", model, *RAZOR, "-o", "line.trace").fine()
    corpus = kv("inspect", "file.trace", "--json").document["corpora"]["repeat"][0]
    assert (corpus["seed"], corpus["samples"], corpus["options"]["period"]) == (5, 3, 20)
    assert Path("mixed.trace").read_bytes() == Path("line.trace").read_bytes()


def test_settings_with_dashes(model: Path, induction: Path, here: Path) -> None:
    kv("calibrate", induction, "--method", "razor", "--set", "recent-ratio=0.5", "-o", "dash.plan").fine()
    kv("calibrate", induction, "--method", "razor", "--set", "recent_ratio=0.5", "-o", "score.plan").fine()
    assert Path("dash.plan").read_bytes() == Path("score.plan").read_bytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed: 1", ["c.yaml", "got 'sed'", "id you mean 'seed'"]),
        ("profile: {tokns: 3}", ["profile in c.yaml", "got 'tokns'", "id you mean 'tokens'"]),
        ("replay: {tokens: 3}", ["replay in c.yaml", "got 'tokens'"]),
        ("profile: 3", ["c.yaml gives profile no options", "3"]),
        ("profile: {force: 3}", ["--force in c.yaml", "3", "true or false"]),
        ("profile: {tokens: true}", ["--tokens in c.yaml", "True"]),
        ("profile: {tokens: {many: 1}}", ["--tokens in c.yaml", "many"]),
        ("seed: [1", ["c.yaml is not YAML", "line 1"]),
        ("- seed", ["c.yaml is no configuration", "list"]),
        ("", ["c.yaml is no configuration"]),
        ("profile: {tokens: many}", ["--tokens"]),
        ("profile: {set: {needle: {lenghts: 3}}}", ["lenghts", "id you mean 'lengths'"]),
    ],
)
def test_refused(text: str, words: list[str], model: Path, here: Path) -> None:
    Path("c.yaml").write_text(text)
    kv("--config", "c.yaml", "profile", model).refused(*words)


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_file_that_cannot_be_read(name: str, model: Path, here: Path) -> None:
    kv("--config", name, "profile", model).refused("cannot read the configuration", name)
    kv("profile", model, "--config").refused("--config needs a file")


def test_a_file_that_is_no_text(model: Path, here: Path) -> None:
    Path("c.yaml").write_bytes(b"\xff\xfe\x00seed")
    kv("--config", "c.yaml", "profile", model).refused("c.yaml is not YAML")
