"""Known answers of Locret, card A23; that it loses nothing at a budget of everything is law 1."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._training import KINDS, ramp
from kvtool.methods.locret import label
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.rotary import NONE
from kvtool.statistics._base import States
from tests import models
from tests.methods.training import interrupted, reused
from tests.models import INDUCTION, random_ids, with_tokenizer
from tests.running import feed, own
from tests.tolerance import close

SMALL = dict(steps=12, lengths=(240,), prompts=1, kinds=("text",), hidden=4, recent=2, sink=0)


def locret(model: Model, **settings: object) -> Plan:
    return calibrate("locret", {**SMALL, **settings}, model=with_tokenizer(model))


def states(rows: int, *, softcap: float | None = None) -> States:
    """Six heads over two KV heads, 20 tokens of which the last `rows` follow the context."""
    draw = torch.Generator().manual_seed(2)
    q, k = torch.randn(6, 20, 8, generator=draw), torch.randn(2, 20, 8, generator=draw)
    sample = Sample(torch.arange(20), "text", question=20 - rows)
    return States(0, q, k, k, 0.3, softcap, None, NONE, None, sample)


def test_the_label_of_one_row_is_its_row_of_logits() -> None:
    """Card: exactly the scaled logits, the largest of each group."""
    made = states(1)
    logits = 0.3 * made.q[:, 19] @ made.k[0, :19].T
    close(label(made, 19)[0], logits[:3].amax(0))
    close(label(made, 19)[1], (0.3 * made.q[3:, 19] @ made.k[1, :19].T).amax(0))


def test_the_label_is_the_largest_of_all_rows() -> None:
    made = states(5)
    one = [label(states(rows), 15) for rows in (1, 2, 3, 4, 5)]
    assert label(made, 15).shape == (2, 15)
    assert all(bool((later >= earlier).all()) for earlier, later in itertools.pairwise(one))
    assert float(label(states(5, softcap=0.5), 15).abs().max()) < 0.5


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "rope-yarn"])
def test_any_attention_can_be_learned_from(name: str) -> None:
    model = models.shared(name)
    plan = locret(model, steps=2)
    whole = [layer for layer, window in enumerate(model.geometry.windows) if window is None]
    for table in plan.keep.select.tables.values():
        filled = table.float().abs().flatten(1).amax(1) > 0
        assert filled.nonzero().flatten().tolist() == whole


def test_a_model_of_windows_has_nothing_to_learn() -> None:
    with pytest.raises(InputError, match="sliding window"):
        locret(models.shared("mistral-window"))


def balanced() -> Model:
    """The induction model with queries and keys of one size, or the network would have to look for keys by a glass."""
    model = models.induction_model()
    for layer in model.network.model.layers:
        layer.self_attn.q_proj.weight /= 26
        layer.self_attn.k_proj.weight *= 26
    return model


def test_what_answers_look_at_is_learned() -> None:
    """The induction head's logit is large where the entry's previous token is one that follows the context. So an entry
    scores high if it comes after a common character, which the network must read off the key."""
    induction = balanced()
    plan = locret(induction, hidden=16, steps=150, prompts=4, lr=1e-2, budget=0.25)
    (fresh,) = _training.prompts(with_tokenizer(induction), ["text"], [300], 1, seed=7)
    seen = _training.states(induction, fresh)[INDUCTION[0]]
    wanted = label(seen, fresh.question)[INDUCTION[1]]
    cache = SegmentCache(induction, plan)
    feed(induction, cache, fresh.tokens[None, : fresh.question], [fresh.question])
    (lane,) = cache.segments[INDUCTION[0]].lanes()
    scores = lane.selector.running[0, INDUCTION[1]]
    found, missed = wanted > wanted.max() / 2, wanted <= wanted.max() / 2
    assert found.sum() > 20
    assert missed.sum() > 5
    right = (scores[found][:, None] > scores[missed]).float().mean()
    assert float(right) > 0.75  # of pairs; chance is one half, and what follows a context is not known
    assert float(plan.evidence["loss"][-10:].mean()) < 0.5 * float(plan.evidence["loss"][:10].mean())


@pytest.mark.parametrize("position", ["original", "reindex"])
def test_a_budget_that_suffices_is_full_attention(position: str, llama: Model) -> None:
    """Card: with nothing dropped, places inside the cache and true ones are the same."""
    ids = random_ids(1, 30, seed=6)
    for when in ("prefill", "chunk"):
        plan = locret(llama, budget=60, position=position, when=when, steps=1)
        close(feed(llama, SegmentCache(llama, plan), ids, [12, 10, *[1] * 8]), own(llama, ids))


def test_a_prompt_in_chunks_never_holds_more_than_budget_and_chunk(llama: Model) -> None:
    plan = locret(llama, budget=16, recent=4, when="chunk", position="reindex", steps=1)
    cache, ids = SegmentCache(llama, plan), random_ids(1, 80, seed=6)
    with llama.served(), torch.no_grad():
        for at in range(0, 80, 8):
            llama.network(input_ids=ids[:, at : at + 8], past_key_values=cache)
            assert int(cache.entries().max()) == min(16, at + 8)


def test_an_interrupted_training_resumes_where_it_was(tmp_path: Path, llama: Model) -> None:
    seen = interrupted("locret", {**SMALL, "steps": 14}, with_tokenizer(llama), tmp_path, 11)
    assert next(done for done in seen if done) == 11


def test_networks_of_another_plan(tmp_path: Path, llama: Model) -> None:
    path = str(reused(functools.partial(locret, llama), tmp_path))
    other = calibrate("snapkv", {}, model=llama).write(str(tmp_path / "other"))
    with pytest.raises(InputError, match="not trained by this method"):
        locret(llama, weights=other)
    with pytest.raises(InputError):
        locret(models.shared("qwen3"), weights=path)


def test_every_kind_of_prompt_knows_its_context(llama: Model) -> None:
    made = _training.prompts(with_tokenizer(llama), list(KINDS), [900], 2, seed=0)
    assert len(made) == 2 * len(KINDS)
    for sample in made:
        assert 0 < sample.question < len(sample.tokens)
        if sample.answer is not None:
            assert sample.tokens[-len(sample.answer) :].tolist() == sample.answer.tolist()
    with pytest.raises(InputError, match="kind of prompt"):
        _training.prompts(with_tokenizer(llama), ["riddle"], [900], 1, seed=0)


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [ramp(step, 50) for step in range(50)]
    assert max(factors) == 1.0
    assert factors[0] == pytest.approx(0.2)
    assert factors[4:26] == [1.0] * 22
    assert factors[25:] == sorted(factors[25:], reverse=True)
    assert 0 < factors[-1] < 0.1
