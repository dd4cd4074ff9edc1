"""Problems with checkable answers: what is asked, of what length, and that only what the model solves is left."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.measuring.problems import TASKS, problems, solves
from kvtool.model import Model
from tests.models import repeated, with_tokenizer


def test_tasks_and_lengths_take_turns(llama: Model) -> None:
    made = problems(with_tokenizer(llama), tuple(TASKS), (700, 900), 10, seed=0, solved=False)
    assert [sample.kind for sample in made] == (["passkey", "needle", "repeat", "two-hop"] * 3)[:10]
    for sample, length in zip(made, [700] * 4 + [900] * 4 + [700] * 2, strict=True):
        assert abs(len(sample.tokens) - length) <= (2 if sample.kind == "repeat" else 0)
        assert sample.answer is not None
        assert len({tuple(other.tokens.tolist()) for other in made}) == len(made)


def test_a_repeat_asks_for_what_the_first_copy_says(llama: Model) -> None:
    for sample in problems(with_tokenizer(llama, start=True), ("repeat",), (61,), 4, seed=1, solved=False):
        assert sample.answer is not None
        assert sample.tokens[0] == 0  # the start token
        first, second = sample.tokens[1:41], torch.cat([sample.tokens[41:], sample.answer])
        assert torch.equal(second, first[: len(second)])
        assert len(sample.answer) == 8


def test_only_what_the_model_solves_is_left(induction: Model) -> None:
    """The induction model continues a repeat unless a token occurs twice in it."""
    model = with_tokenizer(induction)
    kept = problems(model, ("repeat",), (30,), 3, seed=0)
    everything = problems(model, ("repeat",), (30,), 9, seed=0, solved=False)
    assert 0 < len(kept) < len(everything)
    for sample in kept:
        assert sample.answer is not None
        ids = sample.tokens
        for token in sample.answer:
            with torch.no_grad():
                assert int(model.network(input_ids=ids[None]).logits[0, -1].argmax()) == int(token)
            ids = torch.cat([ids, token[None]])


def test_one_wrong_token_is_not_solved(induction: Model) -> None:
    ids = repeated(20, 2)
    prompt, answer = ids[:30], ids[30:35].clone()
    assert solves(induction, Sample(prompt, "repeat", answer=answer))
    for place in range(len(answer)):
        wrong = answer.clone()
        wrong[place] = ids[0]
        assert not solves(induction, Sample(prompt, "repeat", answer=wrong))


def test_nothing_to_train_on_is_told(llama: Model) -> None:
    with pytest.raises(InputError, match="solves none"):
        problems(with_tokenizer(llama), ("repeat",), (60,), 4, seed=0)
    with pytest.raises(InputError, match="unknown task"):
        problems(with_tokenizer(llama), ("repeat", "sums"), (60,), 4, seed=0)
