"""Passkeys are the digits they say, and the demo model finds them."""

from __future__ import annotations

import pytest
import torch

from kvtool.corpus.haystack import Haystack
from kvtool.corpus.passkey import PLACES, multi_passkey, passkey
from kvtool.errors import InputError

pytestmark = pytest.mark.real


def test_the_grid_has_one_sample_per_point_and_key(demo):
    corpus = passkey(demo, lengths=(200, 300), depths=(0.1, 0.9), keys=3)
    grid = [(sample.length, sample.depth) for sample in corpus.samples]
    assert grid == [(length, depth) for length in (200, 300) for depth in (0.1, 0.9) for _ in range(3)]
    assert len({tuple(sample.answer.tolist()) for sample in corpus.samples}) == len(grid)


@pytest.mark.parametrize("digits", [1, 5, 9])
def test_a_key_is_its_digits(demo, digits):
    for sample in passkey(demo, lengths=(200,), depths=(0.5,), digits=digits).samples:
        said = {demo.tokenizer.decode(sample.tokens[start:end]).strip() for start, end in sample.evidence}
        (key,) = said
        assert key.isdigit()
        assert len(key) == digits
        assert demo.tokenizer.decode(sample.tokens).count(key) >= 2


def test_the_demo_model_says_the_key(demo):
    for sample in passkey(demo, lengths=(300,), depths=(0.1, 0.6), keys=1, seed=5).samples:
        ids = torch.cat([sample.tokens, sample.answer])[None, :-1]
        with torch.no_grad():
            logits = demo.network(input_ids=ids, logits_to_keep=len(sample.answer)).logits[0]
        assert torch.equal(logits.argmax(-1), sample.answer)


def test_the_demo_model_answers_the_training_tail(demo):
    sample = multi_passkey(demo, length=600, passkeys=6)
    with torch.no_grad():
        said = demo.network(input_ids=sample.tokens[None]).logits[0].argmax(-1)
    right = torch.cat([said[a - 1 : b - 1] == sample.tokens[a:b] for a, b in sample.labels])
    assert right.float().mean() >= 0.9


def test_labels_repeat_the_evidence_in_order(demo):
    sample = multi_passkey(demo, length=768)
    assert len(sample.tokens) == sample.length == 768
    assert len(sample.labels) == len(sample.evidence) == 10
    assert list(sample.labels) == sorted(sample.labels)
    keys = []
    for (told, ended), (start, end) in zip(sample.evidence, sample.labels, strict=True):
        assert ended < sample.labels[0][0]
        assert torch.equal(sample.tokens[told:ended], sample.tokens[start:end])
        keys.append(demo.tokenizer.decode(sample.tokens[start:end]).strip())
    assert all(key.isdigit() and len(key) == 5 for key in keys)
    assert len({key[0] for key in keys}) == 10


def test_training_prompts_depend_on_seed_and_index_alone(demo):
    straw = Haystack(demo, "calibration")
    made = {
        (seed, index): multi_passkey(demo, length=400, passkeys=2, seed=seed, index=index, haystack=straw)
        for seed in (0, 1)
        for index in (0, 1)
    }
    assert len({tuple(sample.tokens.tolist()) for sample in made.values()}) == 4
    again = multi_passkey(demo, length=400, passkeys=2, seed=1, index=1)
    assert torch.equal(again.tokens, made[1, 1].tokens)


@pytest.mark.parametrize("options", [{"keys": 0}, {"digits": 0}])
def test_empty_grids_are_refused(demo, options):
    with pytest.raises(InputError, match="expected 1 or more"):
        passkey(demo, **options)


def test_there_are_only_so_many_names(demo):
    with pytest.raises(InputError, match=f"at most {len(PLACES)}"):
        multi_passkey(demo, length=4000, passkeys=len(PLACES) + 1)
