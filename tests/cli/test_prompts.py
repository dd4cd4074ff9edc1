"""generate with several prompts: each is answered as if it were alone, whatever the documents' plans."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from kvtool.commands import generate
from tests.cli.terminal import kv

TEXT = "What is read once is asked more than once, and nobody has to read it again for the next question. " * 2
PROMPTS = ("Who?", "And why is it that they ask so much? ", "\nSo ", "Who?")
TOKENS = 8

PLANS = {
    "full": (),
    "streaming": ("--method", "streaming", "--set", "sink=4", "--set", "recent=16"),
    "kivi": ("--method", "kivi", "--set", "bits=4", "--set", "group=8", "--set", "recent=8"),
    "snapkv": ("--method", "snapkv", "--set", "window=8"),
    "quest": ("--method", "quest", "--set", "page=8"),
    "tova": ("--method", "tova", "--set", "budget=0.5"),  # evicts at every step: no part of it can be shared
}


@pytest.fixture(scope="module")
def kept(shelf: Path, model: Path) -> dict[str, Path]:
    """The document under each plan, and twice after a prefix."""
    (shelf / "asked.txt").write_text(TEXT)
    (shelf / "rules.txt").write_text("Answer briefly. ")
    found = {}
    for name, options in PLANS.items():
        plan = shelf / f"asked.{name}.plan"
        if options:
            kv("calibrate", model, *options, "-o", plan).fine()
        found[name] = shelf / f"asked.{name}.kv"
        chosen = ("--plan", plan) if options else ()
        kv("save", model, shelf / "asked.txt", *chosen, "-o", found[name]).fine()
    found["behind"] = shelf / "asked.behind.kv"
    kv("save", model, shelf / "asked.txt", "--prefix", shelf / "rules.txt", "-o", found["behind"]).fine()
    return found


def answers(model: Path, *arguments: object, stdin: bytes = b"") -> list[dict[str, object]]:
    ran = kv("generate", model, *arguments, "--tokens", TOKENS, "--json", stdin=stdin).fine()
    found: list[dict[str, object]] = ran.document["answers"]
    return found


def one_by_one(model: Path, *arguments: object) -> list[dict[str, object]]:
    return [answer for prompt in PROMPTS for answer in answers(model, *arguments, "-p", prompt)]


def flags() -> list[str]:
    return [word for prompt in PROMPTS for word in ("-p", prompt)]


@pytest.mark.parametrize("name", [*PLANS, "behind"])
def test_each_as_if_alone(name: str, model: Path, kept: dict[str, Path]) -> None:
    with mock.patch.object(generate, "feed", wraps=generate.feed) as passes:
        together = answers(model, kept[name], *flags())
    assert together == one_by_one(model, kept[name])
    assert [answer["prompt"] for answer in together] == list(PROMPTS)
    assert 1 < passes.call_count <= TOKENS  # a pass for all of them, not one each


def test_the_document_is_held_once(model: Path, kept: dict[str, Path]) -> None:
    """Where its plan allows it."""
    with mock.patch.object(generate.snapshot, "load", wraps=generate.snapshot.load) as loads:
        answers(model, kept["kivi"], *flags())
        assert loads.call_count == 1
        answers(model, kept["tova"], *flags())
        assert loads.call_count == 1 + len(PROMPTS)


def test_over_several_documents(model: Path, kept: dict[str, Path]) -> None:
    paths = (kept["behind"], kept["behind"], "--position", "contiguous")
    assert answers(model, *paths, *flags()) == one_by_one(model, *paths)


def test_a_prompt_that_ends_early_leaves_the_others(model: Path, kept: dict[str, Path], here: Path) -> None:
    """What would end the first answer in its middle leaves the other prompts' answers as they are."""
    alone = one_by_one(model, kept["full"])
    ids = [answer["ids"] for answer in alone]
    end = next(token for token in ids[1][2:] if token not in ids[0] + ids[2])  # type: ignore[index, operator]
    where = ids[1].index(end)  # type: ignore[attr-defined]
    with mock.patch("transformers.PreTrainedTokenizerFast.eos_token_id", end, create=True):
        found = [answer["ids"] for answer in answers(model, kept["full"], *flags())]
    assert found == [ids[0], ids[1][:where], ids[2], ids[3]]  # type: ignore[index]


def test_prompts_of_a_file(model: Path, kept: dict[str, Path], here: Path) -> None:
    expected = answers(model, kept["full"], *flags())
    (here / "asked.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    assert answers(model, kept["full"], "--prompts", "asked.jsonl") == expected
    assert answers(model, kept["full"], "--prompts", "-", stdin=Path("asked.jsonl").read_bytes()) == expected
    (here / "lines.txt").write_text("Who?\n\nÜber \U0001f389\n")
    found = answers(model, kept["full"], "--prompts", "lines.txt", "-p", "first")
    assert [answer["prompt"] for answer in found] == ["first", "Who?", "Über \U0001f389"]


def test_what_is_printed(model: Path, kept: dict[str, Path]) -> None:
    texts = [str(answer["text"]) for answer in answers(model, kept["full"], *flags())]
    printed = kv("generate", model, kept["full"], *flags(), "--tokens", TOKENS).fine()
    assert printed.out.decode() == "\n\n".join(texts) + "\n"
    assert "first tokens of 4 prompts" in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("FILE",), ("no prompt", "--prompts")),
        (("FILE", "-p", ""), ("an empty prompt",)),
        (("FILE", "-p", "\udcff"), ("the prompt is not text", "UTF-8")),
        (("FILE", "--prompts", "missing"), ("no such text: got missing",)),
        (("FILE", "--prompts", "none.txt"), ("an empty source: got none.txt",)),
        (("FILE", "--prompts", "other.jsonl"), ("line 1 of other.jsonl has no text under 'prompt'",)),
        (("-", "--prompts", "-"), ("stdin cannot carry",)),
        (("TOVA", "-p", "a", "-p", "b"), ("got a snapshot on stdin", "expected a file")),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], words: tuple[str, ...], model: Path, kept: dict[str, Path], here: Path
) -> None:
    (here / "none.txt").write_text("\n \n")
    (here / "other.jsonl").write_text('{"text": "x"}\n')
    names: dict[str, object] = {"FILE": kept["full"], "TOVA": "-"}
    given = [names.get(argument, argument) for argument in arguments]
    kv("generate", model, *given, stdin=kept["tova"].read_bytes() if "TOVA" in arguments else b"").refused(*words)
