"""Three orders of the same context and question, token for token."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.order import FORMS, MOST, order
from kvtool.errors import InputError

pytestmark = pytest.mark.real
SMALL = dict(lengths=(400,), samples=3, seed=2)


def test_the_forms_are_orders_of_the_same_parts(demo):
    forms = {form: order(demo, form=form, **SMALL).samples for form in FORMS}
    for plain, first, twice in zip(*forms.values(), strict=True):
        assert len(plain.tokens) == 400
        start = len(demo.start)
        context, tail = plain.tokens[start : plain.question], plain.tokens[plain.question :]
        assert torch.equal(twice.tokens, torch.cat([plain.tokens[:start], context, context, tail]))
        asked = len(first.tokens) - len(plain.tokens)
        question = first.tokens[start : start + asked]
        assert torch.equal(question, tail[:asked])
        assert demo.tokenizer.decode(question).endswith("?")
        assert torch.equal(first.tokens[start + asked :], plain.tokens[start:])
        for sample in (plain, first, twice):
            assert torch.equal(sample.tokens[sample.question :], tail)
            assert torch.equal(sample.answer, plain.answer)
            assert sample.length == 400
            assert sample.depth == plain.depth


@pytest.mark.parametrize("form", FORMS)
def test_the_key_stands_at_every_span_of_evidence(demo, form):
    for sample in order(demo, form=form, **SMALL).samples:
        assert len(sample.evidence) == (2 if form == "twice" else 1)
        for start, end in sample.evidence:
            assert torch.equal(sample.tokens[start:end], sample.answer)
        place = demo.tokenizer.decode(sample.tokens).rsplit("What is the pass key of ", 1)[1].split("?")[0]
        start = sample.evidence[0][0]
        assert demo.tokenizer.decode(sample.tokens[start - 12 : start]).endswith(f"The pass key of {place}:")


def test_refused(demo):
    with pytest.raises(InputError, match="Did you mean 'twice'"):
        order(demo, form="twic")
    for options in ({"samples": 0}, {"digits": 0}, {"places": MOST + 1}):
        with pytest.raises(InputError, match=f"{MOST} places or fewer"):
            order(demo, **options)
