"""The prompt of a needle ends as the text before the evidence does."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.needle import NEEDLES, needle
from kvtool.errors import InputError

pytestmark = pytest.mark.real


def test_the_prompt_ends_as_the_text_before_the_evidence(demo):
    for sample in needle(demo, lengths=(400,)).samples:
        ((start, _end),) = sample.evidence
        assert torch.equal(sample.tokens[start - 4 : start], sample.tokens[-4:])


def test_all_needles_take_their_turn(demo):
    samples = needle(demo, lengths=(200,), depths=(0.2, 0.8), samples=len(NEEDLES) // 2).samples
    answers = {demo.tokenizer.decode(sample.answer) for sample in samples}
    assert answers == {rest for _, _, rest in NEEDLES}


def test_no_token_of_a_needle_stands_twice(demo):
    """Else a head's score, counted per step, could exceed one."""
    for sample in needle(demo, lengths=(200,), depths=(0.5,), samples=len(NEEDLES)).samples:
        assert len(set(sample.answer.tolist())) == len(sample.answer)


def test_no_samples_are_refused(demo):
    with pytest.raises(InputError, match="expected 1 or more"):
        needle(demo, samples=0)
