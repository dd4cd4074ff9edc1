"""LLM-Drop: known answers of its card, and what a dropped layer does to the rest of the engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvtool import plan as plans
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.methods import llm_drop
from kvtool.plan import Plan, compose
from kvtool.replay.subject import Subject
from kvtool.slots import Keep
from tests import models
from tests.analyze.traces import TOKENS, blank
from tests.laws.methods import trace
from tests.laws.test_compositions import bits, selection
from tests.models import random_ids
from tests.running import feed, left_padded, own
from tests.statistics.naive import written_down
from tests.tolerance import close, error, same

IDS = random_ids(2, 30, seed=5)
CHUNKS = [20, *[1] * 10]


def dropping(layers: int, *gone: int, model: models.Model | None = None) -> Plan:
    model = model or models.shared("llama")
    dropped = torch.zeros(layers, dtype=torch.uint8)
    dropped[list(gone)] = 1
    everything = torch.ones(layers, model.geometry.kv_heads)
    return Plan("drop", model.fingerprint, keep=Keep.heads(everything, sink=0, recent=1, dropped=dropped))


@pytest.mark.parametrize(
    ("drop", "gone"), [(0, []), (1, [2]), (2, [0, 2]), (0.34, [2]), (0.67, [0, 2]), (9, [0, 1, 2])]
)
def test_the_most_similar_layers_are_dropped_first(drop: float, gone: list[int]) -> None:
    made = blank("residual")
    made["residual"]["attention"] = TOKENS * torch.tensor([0.9, -1.0, 1.0], dtype=torch.float64)
    made["residual"]["tokens"] += TOKENS
    keep = calibrate("llm-drop", {"drop": drop}, trace=made).keep
    assert keep is not None
    assert keep.gone.nonzero().flatten().tolist() == gone
    assert keep.lossless == (not gone)


def test_attention_that_puts_out_nothing_goes_first_and_is_not_missed() -> None:
    model = models.build("llama")
    model.network.model.layers[1].self_attn.o_proj.weight.zero_()
    seen = trace(model, ("residual",))
    plan = calibrate("llm-drop", {"drop": 1}, trace=seen)
    assert plan.keep is not None
    assert plan.keep.gone.tolist() == [False, True, False]
    close(plan.evidence["similarity"][1], torch.tensor(1.0))
    close(feed(model, SegmentCache(model, plan), IDS, CHUNKS), own(model, IDS))


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma2", "gpt-neox"])
def test_a_dropped_layer_is_one_whose_attention_is_zero(name: str) -> None:
    """With sink logits, soft caps and sandwich norms too; in prefill as in decode, and under padding."""
    model, cut = models.build(name), models.build(name)
    layers = model.geometry.layers
    attention = cut.attention_modules[1]
    projection = attention.dense if hasattr(attention, "dense") else attention.o_proj
    projection.weight.zero_()
    plan = dropping(layers, 1, model=model)
    rows = [random_ids(1, length, seed=length)[0] for length in (30, 17)]
    ids, mask = left_padded(rows)
    got = feed(model, SegmentCache(model, plan), ids, CHUNKS, mask=mask)
    expected = own(cut, ids, mask=mask)
    for index, row in enumerate(rows):
        close(got[index, -len(row) :], expected[index, -len(row) :])
    assert error(got[0], own(model, ids, mask=mask)[0]) > 1e-2


def lacking(gone: list[int], ids: torch.Tensor, seed: int) -> torch.Tensor:
    """s [L] by definition: a model whose attention weights of these layers are zero, run as it is."""
    cut = models.build("llama", seed)
    for layer in gone:
        cut.network.model.layers[layer].self_attn.o_proj.weight.zero_()
    rows = [torch.cosine_similarity(seen.before, seen.middle, dim=-1).mean() for seen in written_down(cut, ids)]
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(2))
def test_measured_again_after_every_drop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = models.build("llama", seed), random_ids(1, 40, seed=seed)[0]
    monkeypatch.setattr(llm_drop, "texts", lambda context, samples, tokens: [Sample(ids, "text")])
    plan = calibrate("llm-drop", {"drop": 2, "again": True}, model=model)
    first = lacking([], ids, seed)
    one = int(first.argmax())
    second = lacking([one], ids, seed)
    second[one] = -2
    other = int(second.argmax())
    assert plan.provenance["facts"]["dropped"] == [one, other]
    second[one] = first[one]
    close(plan.evidence["similarity"], second)
    assert plan.keep is not None
    assert plan.keep.gone.nonzero().flatten().tolist() == sorted([one, other])


def test_a_layer_that_is_idle_without_another_goes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted case: layer 0 only prepares what layer 1 reads, and layer 2 takes over once that is gone."""
    whole, less = torch.tensor([0.5, 0.9, 0.8]), torch.tensor([0.95, 1.0, 0.2])
    monkeypatch.setattr(llm_drop, "texts", lambda context, samples, tokens: [])
    monkeypatch.setattr(llm_drop, "similarity", lambda model, read, keep: less if keep.gone[1] else whole)
    plan = calibrate("llm-drop", {"drop": 2, "again": True}, model=models.shared("llama"))
    assert plan.provenance["facts"]["dropped"] == [1, 0]
    assert whole.argsort(descending=True)[:2].tolist() == [1, 2]
    same(plan.evidence["similarity"], torch.tensor([0.95, 0.9, 0.2]))


def test_nothing_is_held_or_read() -> None:
    model = models.shared("llama")
    caches = [SegmentCache(model, plan) for plan in (None, dropping(3, 0, 2))]
    for cache in caches:
        feed(model, cache, IDS, CHUNKS)
    assert caches[1].nbytes * 3 == caches[0].nbytes
    assert caches[1].read_bytes * 3 == caches[0].read_bytes
    assert caches[1].entries().tolist() == [[0, 0], [30, 30], [0, 0]]


def test_a_replay_feeds_the_prompt_without_the_layer() -> None:
    """The plan's prefill is not the full cache's, so that the two cannot share one."""
    model = models.shared("llama")
    plan = dropping(3, 1)
    assert not plan.dense
    subject = Subject(model, plan)
    caches = subject.both(IDS[:, :-1])
    expected = feed(model, SegmentCache(model, plan), IDS, [29, 1])[:, -1]
    close(subject.step(caches["plan"], IDS[:, -1:]), expected)
    close(subject.step(caches["full"], IDS[:, -1:]), own(model, IDS)[:, -1])


def test_it_composes_with_stores_and_with_other_keeps() -> None:
    model = models.double("llama")
    gone = dropping(3, 1, model=model)
    for other in (selection(model), bits(model, 4)):
        ways = [compose(gone, other), compose(other, gone)]
        outs = [feed(model, SegmentCache(model, made), IDS, CHUNKS) for made in ways]
        same(outs[0], outs[1])
        alone = [feed(model, SegmentCache(model, plan), IDS, CHUNKS) for plan in (gone, other)]
        assert min(error(outs[0][:, 20:], out[:, 20:]) for out in alone) > 1e-3
        cache = SegmentCache(model, ways[0])
        feed(model, cache, IDS, CHUNKS)
        assert cache.entries()[1].tolist() == [0, 0]
    twice = compose(gone, dropping(3, 2, model=model))
    assert twice.keep is not None
    assert twice.keep.gone.tolist() == [False, True, True]


def test_a_plan_file_remembers(tmp_path) -> None:
    made = dropping(3, 1)
    read = plans.read(made.write(str(tmp_path / "plan")))
    assert read.keep is not None
    same(read.keep.dropped, made.keep.dropped)  # type: ignore[union-attr]
    assert dataclasses.replace(read.keep, dropped=None).lossless
