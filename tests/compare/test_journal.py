"""The journal gives back what was written, and refuses or repairs what is not whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtool.compare.journal import Journal
from kvtool.errors import InputError

KEY = ("passkey/ab", "known", "snapkv@0.5", "cd")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "board.jsonl", "one")
    journal.score(KEY, {"bytes": 3, "scores": {"hit": 1.0}})
    journal.score(("text/ef", "known", "full", ""), {"bytes": 4, "scores": {"kl": 0.1 + 0.2}})
    return journal.path


def test_what_was_written_is_read(path: Path) -> None:
    assert Journal(path, "one").scores == {
        KEY: {"bytes": 3, "scores": {"hit": 1.0}},
        ("text/ef", "known", "full", ""): {"bytes": 4, "scores": {"kl": 0.1 + 0.2}},
    }


@pytest.mark.parametrize("lost", [1, 2, 30])
def test_half_a_line_is_dropped_and_the_next_one_is_whole(path: Path, lost: int) -> None:
    path.write_bytes(path.read_bytes()[:-lost])
    journal = Journal(path, "one")
    assert list(journal.scores) == [KEY]
    journal.score(KEY, {"bytes": 5})
    assert Journal(path, "one").scores == {KEY: {"bytes": 5}}


def test_another_comparison_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"another comparison.*--force"):
        Journal(path, "two")


@pytest.mark.parametrize("content", ["", "{}\n", "[]\n", "nothing\n", '{"kind": "comparison"}\n'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "board.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="no journal"):
        Journal(path, "one")
