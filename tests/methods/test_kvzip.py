"""KVzip: the pass that writes the prompt again, written out; and what survives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.keep.rebuild import OVERLAP, rebuild
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods._filled import scored
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.models import INDUCTION, PREVIOUS, random_ids, repeated
from tests.running import feed, left_padded
from tests.statistics.naive import written_down
from tests.tolerance import close, same

PROMPT, CHUNK, SINK = 23, 9, 2
IDS = random_ids(1, PROMPT, seed=31)


def made(model: Model, **settings) -> Plan:
    return calibrate("kvzip", dict(chunk=CHUNK, sink=SINK, budget=0.4) | settings, model=models.with_tokenizer(model))


def defined(model: Model, plan: Plan, ids: torch.Tensor) -> list[torch.Tensor]:
    """Scores [K,n] of the entries of ids [n], layer by layer: a plain forward of prompt and pass for each chunk, and a
    softmax for each query."""
    settings, found = plan.keep.select.settings, []
    group = model.geometry.group
    for low in range(0, len(ids), CHUNK):
        chunk = ids[low : low + CHUNK].tolist()
        ask = [*settings["onward"], *ids[max(0, low - OVERLAP) : low].tolist()] if low else settings["instruction"]
        fed = [*ids.tolist(), *ask, *settings["opening"], *chunk]
        sinks = list(range(min(SINK, low)))
        columns = []
        for layer in written_down(model, torch.tensor(fed)):
            best = torch.zeros(len(layer.k), len(chunk), dtype=torch.float64)
            for row in range(len(ids), len(fed)):
                seen = [*sinks, *range(low, low + len(chunk)), *range(len(ids), row + 1)]
                for head, q in enumerate(layer.q[:, row]):
                    p = torch.softmax(layer.scale * layer.k[head // group, seen].double() @ q.double(), 0)
                    at = slice(len(sinks), len(sinks) + len(chunk))
                    best[head // group] = torch.maximum(best[head // group], p[at])
            columns.append(best)
        found.append(columns)
    return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scores_are_those_of_the_definition(name: str) -> None:
    model = models.shared(name)
    plan = made(model)
    for mine, theirs in zip(scored(model, plan.keep, IDS[0]), defined(model, plan, IDS[0]), strict=True):
        close(mine, theirs, torch.float32)


def test_the_best_of_the_model_stay() -> None:
    model = models.double("llama")
    plan = made(model)
    cache = SegmentCache(model, plan)
    feed(model, cache, IDS, [PROMPT])
    full = [lane.recall()[0] for layer in cache.segments for lane in layer.lanes()]
    scores = torch.cat(defined(model, plan, IDS[0]))
    cache.finish()
    budget = round(0.4 * PROMPT) * len(scores) - SINK * len(scores)
    border = scores[:, SINK:].flatten().sort(descending=True).values[budget - 1]
    kept = [lane.recall()[0] for layer in cache.segments for lane in layer.lanes()]
    for row, before, after in zip(scores, full, kept, strict=True):
        stays = [at for at in range(PROMPT) if at < SINK or row[at] >= border]
        same(after, before[:, :, stays])


def test_a_pass_leaves_nothing_behind() -> None:
    model, plan = models.shared("llama"), made(models.shared("llama"))
    cache = SegmentCache(model, plan)
    feed(model, cache, IDS, [PROMPT])
    before = [tensor.clone() for layer in cache.segments for lane in layer.lanes() for tensor in lane.recall()[:2]]
    rebuild(model.network, cache.segments)
    after = [tensor for layer in cache.segments for lane in layer.lanes() for tensor in lane.recall()[:2]]
    for one, other in zip(before, after, strict=True):
        same(one, other)
    assert cache.get_seq_length() == PROMPT
    assert model.network.config._attn_implementation != "kvtool"


@pytest.mark.parametrize("spread", ["model", "head"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_that_was_adopted(batch: int, spread: str) -> None:
    model = models.double("llama")
    plan, ids = made(model, spread=spread), random_ids(batch, PROMPT + 4, seed=32)
    full, cache = SegmentCache(model), SegmentCache(model, plan)
    full.record_for(plan)
    feed(model, full, ids[:, :PROMPT], [PROMPT])
    cache.adopt(full)
    with model.served(), torch.no_grad():
        steps = [model.network(input_ids=token, past_key_values=cache).logits for token in ids[:, PROMPT:].split(1, 1)]
    expected = feed(model, SegmentCache(model, plan, prompt_length=PROMPT), ids, [PROMPT, 1, 1, 1, 1])[:, PROMPT:]
    close(torch.cat(steps, dim=1), expected, torch.float32)


def test_generate_runs_the_passes_within_its_first_step() -> None:
    """Rows with other padding are parts of their own: the outer forward must find its own tokens again."""
    model = models.double("llama")
    plan = made(model)
    ids, mask = left_padded([random_ids(1, length, seed=length)[0] for length in (20, 13)])
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=0)
    with model.served():
        written = model.network.generate(ids, past_key_values=SegmentCache(model, plan), **options)
        for row, length in enumerate((20, 13)):
            alone = ids[row : row + 1, -length:]
            options["attention_mask"] = torch.ones_like(alone)
            cache = SegmentCache(model, plan)
            same(model.network.generate(alone, past_key_values=cache, **options)[0, length:], written[row, 20:])


def test_a_question_that_comes_later_is_answered() -> None:
    """The planted case. The context's tokens are all different, so its end asks for nothing; only the head that looks
    up what followed a token is needed. Written again, every entry is looked up once, by that head."""
    model = models.induction_model()
    context = repeated(60, 1, seed=5)
    asked = [3, 20, 41, 58]

    def answers(plan: Plan) -> list[bool]:
        found = []
        for at in asked:
            cache = SegmentCache(model, plan)
            feed(model, cache, context[None], [60])
            cache.finish()
            with model.served(), torch.no_grad():
                logits = model.network(input_ids=context[None, at : at + 1], past_key_values=cache).logits
            found.append(int(logits[0, -1].argmax()) == int(context[at + 1]))
        return found

    assert all(answers(made(model, budget=0.25, chunk=100)))
    late = calibrate("snapkv", dict(budget=0.25, window=8), model=model)
    assert not any(answers(late)[:3])
    cache = SegmentCache(model, made(model, budget=0.25, chunk=100))
    feed(model, cache, context[None], [60])
    cache.finish()
    held = cache.entries()
    assert int(held[INDUCTION[1]][INDUCTION[1]]) >= 58
    assert int(held.sum()) <= round(0.25 * 60) * held.numel()


def test_heads_that_find_things_keep_everything() -> None:
    model = models.induction_model()
    settings = dict(mode="heads", full=0.25, samples=1, tokens=60, recent=5)
    plan = calibrate("kvzip", settings, model=models.with_tokenizer(model))
    assert bool(plan.keep.full[INDUCTION])
    assert bool(plan.keep.full[PREVIOUS])  # a pass's first token looks at the prompt's last one
    assert int(plan.keep.full.sum()) == 2
    assert float(plan.evidence["score"][0, 1]) < 0.1  # it looks everywhere
    assert plan.keep.select is None


def test_refused() -> None:
    model = models.shared("llama")
    select = made(model).keep.select
    for options in (dict(when="step"), dict(score="key-norm"), dict(score="expected")):
        with pytest.raises(InputError, match="pass on trial"):
            replace(select, **options)
    cache = SegmentCache(model, made(model))
    embedded = model.network.get_input_embeddings()(IDS)
    with model.served(), pytest.raises(InputError, match="looks at tokens"):
        model.network(inputs_embeds=embedded, past_key_values=cache)
