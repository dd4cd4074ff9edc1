"""What holds for every kind: exact lengths and spans, JSON-able provenance, equal tokens from equal seeds."""

from __future__ import annotations

import json

import pytest
import torch

from kvtool.corpus import registry
from kvtool.corpus.haystack import Haystack
from kvtool.errors import InputError
from kvtool.files import digest

SMALL = {
    "graph": {"lengths": (300, 501), "samples": 2},
    "needle": {"lengths": (300, 501), "depths": (0, 0.5, 1)},
    "order": {"lengths": (300, 501), "samples": 2},
    "passkey": {"lengths": (300, 501), "depths": (0, 0.5, 1), "keys": 2},
    "repeat": {"period": 9, "samples": 2},
    "text": {"tokens": 63, "samples": 3},
    "two-hop": {"lengths": (300, 501), "samples": 2},
}
RECALLED = ["graph", "needle", "order", "passkey", "two-hop"]
pytestmark = pytest.mark.real


def test_small_covers_every_kind():
    assert sorted(SMALL) == registry.names()


@pytest.mark.parametrize("kind", SMALL)
def test_provenance_is_json_and_its_hash_is_over_the_tokens(demo, kind):
    corpus = registry.build(kind, demo, **SMALL[kind])
    provenance = json.loads(json.dumps(corpus.provenance))
    assert provenance == corpus.provenance
    assert provenance["kind"] == kind
    assert provenance["tokens"] == sum(len(sample.tokens) for sample in corpus.samples)
    assert provenance["hash"] == digest(*(sample.tokens for sample in corpus.samples))
    assert {sample.kind for sample in corpus.samples} == {kind}
    assert all(sample.tokens.dtype == torch.int64 and sample.tokens.dim() == 1 for sample in corpus.samples)


@pytest.mark.parametrize("kind", SMALL)
def test_equal_seeds_give_equal_tokens_and_other_seeds_others(demo, kind):
    first, again, other = (registry.build(kind, demo, **SMALL[kind], seed=seed) for seed in (3, 3, 4))
    assert first.provenance == again.provenance
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first.samples, again.samples, strict=True))
    assert first.provenance["hash"] != other.provenance["hash"]


@pytest.mark.parametrize("kind", RECALLED)
def test_prompts_have_their_nominal_length(demo, kind):
    samples = registry.build(kind, demo, **SMALL[kind]).samples
    assert [len(sample.tokens) for sample in samples] == [sample.length for sample in samples]
    assert {sample.length for sample in samples} == {300, 501}


@pytest.mark.parametrize("kind", ["needle", "passkey"])
def test_the_answer_stands_at_every_span_of_evidence(demo, kind):
    for sample in registry.build(kind, demo, **SMALL[kind]).samples:
        assert sample.evidence
        for start, end in sample.evidence:
            assert torch.equal(sample.tokens[start:end], sample.answer)


@pytest.mark.parametrize("kind", ["needle", "passkey"])
def test_evidence_lies_at_or_before_its_depth(demo, kind):
    for sample in registry.build(kind, demo, lengths=(2000,), depths=(0.0, 0.4, 1.0)).samples:
        place = sample.evidence[0][0] / sample.length
        assert sample.depth - 0.12 < place < sample.depth + 0.02


@pytest.mark.parametrize("kind", RECALLED)
def test_joining_pieces_equals_tokenising_the_whole(demo, kind):
    """True of this tokenizer, up to the first sentence, which may be cut inside a word."""
    for sample in registry.build(kind, demo, **SMALL[kind]).samples:
        whole = torch.cat([sample.tokens, sample.answer])
        again = demo.ids(demo.tokenizer.decode(whole))
        assert torch.equal(whole[-100:], again[-100:])


@pytest.mark.parametrize("kind", RECALLED)
def test_a_prompt_without_room_is_refused(demo, kind):
    with pytest.raises(InputError, match="too short: got 20 tokens, expected"):
        registry.build(kind, demo, lengths=(20,))


@pytest.mark.parametrize("kind", RECALLED)
def test_an_unknown_haystack_is_refused(demo, kind):
    with pytest.raises(InputError, match="Did you mean 'noise'"):
        registry.build(kind, demo, haystack="noice")


@pytest.mark.parametrize("kind", [*RECALLED, "text"])
def test_a_model_without_tokenizer_is_refused(bare, kind):
    with pytest.raises(InputError, match="no tokenizer"):
        registry.build(kind, bare)


@pytest.mark.parametrize("kind", ["needle", "passkey"])
def test_a_depth_outside_the_text_is_refused(demo, kind):
    with pytest.raises(InputError, match=r"got 1.5, expected 0 to 1"):
        registry.build(kind, demo, depths=(1.5,))


def test_a_length_beyond_the_text_goes_round(demo):
    straw = Haystack(demo, "noise")
    once = sum(map(len, straw.sentences))
    sample = registry.build("passkey", demo, lengths=(10 * once,), depths=(0.5,), keys=1, haystack="noise")
    assert len(sample.samples[0].tokens) == 10 * once
