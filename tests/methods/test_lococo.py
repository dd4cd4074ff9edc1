"""Known answers of LoCoCo, card A24, in a model; of a mixture by itself: `tests/cache/keep/test_convolution.py`."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.dense import plain
from kvtool.errors import InputError
from kvtool.methods import _training
from kvtool.methods._base import Context
from kvtool.methods.lococo import Options, attended, loss, selection
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.serving import Attention
from tests import models
from tests.methods.training import interrupted, reused
from tests.models import random_ids, with_tokenizer
from tests.running import feed
from tests.tolerance import close, error, same

SMALL = dict(
    budget=0.5, slots=4, kernel=3, window=4, recent=2, trained=(0.2, 0.4), steps=6, lengths=(160,), prompts=2,
    kinds=("text",),
)  # fmt: skip
IDS, CHUNKS = random_ids(1, 40, seed=3), [30, *[1] * 10]


def lococo(model: Model, **settings: object) -> Plan:
    return calibrate("lococo", {**SMALL, **settings}, model=with_tokenizer(model))


def changed(plan: Plan, **options: object) -> Plan:
    return replace(plan, keep=replace(plan.keep, select=replace(plan.keep.select, **options)))


def test_without_a_share_it_is_dropping(llama: Model) -> None:
    """Card: λ = 0 is the selection of the best by the last queries."""
    plan = lococo(llama)
    tables = {**plan.keep.select.tables, "share": torch.zeros(3)}
    without, dropping = changed(plan, tables=tables), changed(plan, merge="drop", tables={})
    outs = [feed(llama, SegmentCache(llama, made), IDS, CHUNKS) for made in (plan, without, dropping)]
    same(outs[1], outs[2])
    assert error(outs[0], outs[1]) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "rope-yarn"])
def test_attention_in_training_is_the_models(name: str) -> None:
    """With all of the context's entries the rows after it put out what the model's attention does."""
    model = models.shared(name)
    (sample,) = _training.prompts(with_tokenizer(model), ["text"], [120], 1, seed=0)
    for states in _training.states(model, sample):
        if model.geometry.windows[states.layer] is None:
            q, k, v = states.q[None], states.k[None], states.v[None]
            call = Attention(None, states.scale, states.softcap, states.sink_logits, None, None)
            expected = plain(q, k, v, call)[0, :, sample.question :].transpose(0, 1).flatten(1)
            whole = (k[:, :, : sample.question], v[:, :, : sample.question])
            close(attended(states, sample.question, whole), expected)


def test_where_attention_is_flat_mixing_beats_dropping() -> None:
    """On prompts that were not trained on, and of another kind: what is dropped there is missed as a whole."""
    model = with_tokenizer(models.build("llama"))
    for layer in model.network.model.layers:
        layer.self_attn.q_proj.weight *= 0.05
    plan = lococo(model, slots=32, steps=30, prompts=5, lr=1e-2)
    spec = selection(Context(model.geometry, model), Options(**SMALL), 0.3, {})
    tables = plan.keep.select.tables

    def mean(share: torch.Tensor) -> float:
        found = []
        for sample in _training.prompts(model, ["passkey"], [300], 2, seed=9):
            for states in _training.states(model, sample):
                own = (tables["convolution"], tables["bias"], share)
                found.append(float(loss(model, spec, states, tuple(table[states.layer].float() for table in own))))
        return sum(found) / len(found)

    assert mean(tables["share"]) < 0.8 * mean(torch.zeros(3))
    assert float(plan.evidence["loss"][-6:].mean()) < float(plan.evidence["loss"][:6].mean())


def test_a_buffer_is_filled_between_two_compressions(llama: Model) -> None:
    """Card: while decoding, so many tokens are buffered and then everything is compressed again."""
    plan = lococo(llama, budget=14, when="step", buffer=5)
    cache, held = SegmentCache(llama, plan), []
    with llama.served(), torch.no_grad():
        llama.network(input_ids=IDS[:, :20], past_key_values=cache)
        for at in range(20, 40):
            llama.network(input_ids=IDS[:, at : at + 1], past_key_values=cache)
            held.append(int(cache.entries()[0, 0]))
    assert max(held) == 14
    assert held[:8] == [9, 10, 11, 12, 13, 14, 9, 10]


def test_nothing_is_learned_where_nothing_is_mixed(llama: Model) -> None:
    with pytest.raises(InputError, match="no entry is mixed"):
        lococo(llama, recent=100)


def test_an_interrupted_training_resumes_where_it_was(tmp_path: Path, llama: Model) -> None:
    seen = interrupted("lococo", {**SMALL, "steps": 13}, with_tokenizer(llama), tmp_path, 11)
    assert seen[0] == 11


def test_one_training_serves_every_budget(tmp_path: Path, llama: Model) -> None:
    reused(functools.partial(lococo, llama), tmp_path)
    with pytest.raises(InputError, match="bad option trained"):
        lococo(llama, trained=(0.5, 1.0))
