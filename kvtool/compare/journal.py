"""What is done so far, a line of JSON per score, so that an interrupted comparison goes on where it was.

The first line says under which model, precision and protocol the others hold. A line is written whole or, when the
process is killed, cut: the remains of the last one are dropped. Scores name prompts and plans by their content, so that
one journal serves comparisons that add methods, budgets, tasks or lengths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from kvtool import files
from kvtool.errors import InputError

Key = tuple[str, str, str, str]  # prompt, ask, cell, plan
SCHEMA = 1


class Scores(Protocol):
    """What a race asks, and tells."""

    scores: dict[Key, dict[str, Any]]

    def score(self, key: Key, scores: dict[str, Any]) -> None:
        """Write down what one prompt gave."""


class Journal:
    """`scores`: what is known of a prompt × ask × cell × plan."""

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self.scores: dict[Key, dict[str, Any]] = {}
        if path.exists():
            self._load()
        else:
            self._line({"kind": "comparison", "schema": SCHEMA, "identity": identity})

    def _load(self) -> None:
        payload = self.path.read_bytes()
        whole = payload[: payload.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            mine = head["kind"] == "comparison" and head["schema"] == SCHEMA
            same = head["identity"] == self.identity
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is no journal of a comparison", remedy="choose another -o") from error
        if not mine or not same:
            raise InputError(
                f"{self.path} belongs to another comparison", expected="the same model, --dtype and protocol",
                remedy="choose another -o, or pass --force to start over",
            )  # fmt: skip
        if whole != payload:
            files.replace(self.path, whole)
        for line in lines:
            self.scores[tuple(line["key"])] = line["scores"]

    def score(self, key: Key, scores: dict[str, Any]) -> None:
        """Write down what one prompt gave."""
        self.scores[key] = scores
        self._line({"key": key, "scores": scores})

    def _line(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}", got=error.strerror) from error
