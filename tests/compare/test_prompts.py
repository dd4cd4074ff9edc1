"""Context and question are parted exactly where the question begins, on tokens."""

from __future__ import annotations

import pytest
import torch

from kvtool.compare.prompts import Prompt, asks, chosen, every_task, prompts
from kvtool.errors import InputError
from kvtool.model import Model
from tests.compare.conftest import SETTINGS

QUESTION = {"passkey": "\n\nWhat is the secret pass key?", "needle": "\n\nW", "two-hop": "\n\nWhat is the pass key of"}


def test_which_tasks_there_are() -> None:
    assert every_task() == ["acceptance", "graph", "needle", "passkey", "text", "two-hop"]
    with pytest.raises(InputError, match=r"task of a comparison.*'speed'"):
        chosen(("speed",), {})


def test_the_question_is_what_stands_after_the_context(made: list[Prompt], model: Model) -> None:
    for prompt in (prompt for prompt in made if prompt.task in QUESTION):
        tokens, end = prompt.sample.tokens, prompt.end("after")
        said = model.tokenizer.decode(tokens[end:])
        assert said.startswith(QUESTION[prompt.task])
        assert "?" in said
        assert "?" not in said.partition("?")[2] or prompt.task == "two-hop"
        assert torch.equal(torch.cat([tokens[:end], prompt.follow("after")])[: len(tokens)], tokens)
        assert all(stop <= end for _, stop in prompt.sample.evidence)
        assert len(prompt.follow("after")) - len(prompt.follow("known")) == len(tokens) - 1 - end


def test_a_prompt_is_fed_but_for_its_last_token(made: list[Prompt]) -> None:
    for prompt in made:
        answer = prompt.sample.answer
        assert answer is not None
        assert prompt.end("known") == len(prompt.sample.tokens) - 1
        assert torch.equal(prompt.follow("known"), torch.cat([prompt.sample.tokens[-1:], answer[:-1]]))


def test_a_text_has_no_question(made: list[Prompt]) -> None:
    by_task = {prompt.task: asks(prompt, ("known", "after")) for prompt in made}
    assert by_task == {name: ["known"] if name == "text" else ["after", "known"] for name in by_task}
    assert {tuple(asks(prompt, ("after",))) for prompt in made} == {("known",), ("after",)}


def test_names_depend_on_content(made: list[Prompt], model: Model) -> None:
    again = prompts(model, chosen(("passkey",), SETTINGS), (400,), 0)
    other = prompts(model, chosen(("passkey",), SETTINGS), (400,), 1)
    known = {prompt.key for prompt in made}
    assert {prompt.key for prompt in again} <= known
    assert not {prompt.key for prompt in other} & known
    assert [prompt.first for prompt in made].count(True) == 2
