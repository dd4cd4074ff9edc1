"""The first fact names what the second is about, and the answer says both."""

from __future__ import annotations

import pytest

from kvtool.corpus.twohop import MOST, twohop
from kvtool.errors import InputError

pytestmark = pytest.mark.real


def test_the_answer_needs_both_facts(demo):
    def read(ids):
        return demo.tokenizer.decode(ids)

    for sample in twohop(demo, lengths=(400,), distractors=2).samples:
        place, key = (read(sample.tokens[start:end]) for start, end in sample.evidence)
        assert read(sample.answer) == f"{place}. The pass key that opens{place}:{key}"
        prompt = read(sample.tokens)
        person = prompt.removesuffix(" lives in").rsplit(" ", 1)[1]
        assert prompt.count(f"{person} lives in{place}.") == 1
        assert prompt.count(f"The pass key that opens{place}:{key}.") == 1
        assert person not in read(sample.answer)
        assert sample.depth == min(start for start, _ in sample.evidence) / 400


@pytest.mark.parametrize("distractors", [0, 3])
def test_distractors_are_told_in_the_same_words(demo, distractors):
    prompt = demo.tokenizer.decode(twohop(demo, lengths=(600,), distractors=distractors).samples[0].tokens)
    facts, _tail = prompt.split("What is the pass key", 1)
    assert facts.count(" lives in ") == facts.count("The pass key that opens ") == distractors + 2


@pytest.mark.parametrize("options", [{"samples": 0}, {"digits": 0}, {"distractors": MOST + 1}])
def test_counts_out_of_range_are_refused(demo, options):
    with pytest.raises(InputError, match=f"0 to {MOST} distractors"):
        twohop(demo, **options)
