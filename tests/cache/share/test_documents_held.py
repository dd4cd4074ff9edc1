"""What documents that are put together hold and read: their own plans, ledgers, branches, trials, refusals."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.contexts import Context
from kvtool.cache.share.documents import after, beside, read
from kvtool.cache.trial import Trial
from kvtool.errors import InputError
from kvtool.plan import Plan
from kvtool.serving import Attention
from kvtool.slots import Keep, Read, Select
from kvtool_kernels.ops import attend
from tests import models
from tests.cache.share.apart import PREFIX, QUESTION, TEXTS, asked, document, owned, prefixed, together
from tests.laws.methods import ragged
from tests.laws.stores import stored
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, error, same


@pytest.mark.parametrize("position", ["shared", "contiguous"])
def test_every_document_has_its_own_plan(position: str) -> None:
    """What documents of three plans hold, as attention sees it, held raw instead."""
    model = models.double("llama")
    prefix = prefixed(model)
    plans = [stored(model, "four-bits"), stored(model, "before-rope"), ragged(model, compensate=False)]
    texts = [random_ids(1, 40 + at, seed=30 + at)[0] for at in range(3)]
    held = [document(model, prefix, ids, plan) for ids, plan in zip(texts, plans, strict=True)]
    cache = together(model, held, prefix, position=position)
    raw = [document(model, prefix, ids) for ids in texts]
    for coded, plain in zip(held[:2], raw[:2], strict=True):
        for layer, other in zip(coded.segments, plain.segments, strict=True):
            for lane in layer.lanes():
                k, v, _ = lane.recall()
                recent = other.parts[0].lanes[0].recent
                recent.k[:, lane.heads, : k.shape[2]], recent.v[:, lane.heads, : k.shape[2]] = k, v
    dense = together(model, [*raw[:2], held[2]], prefix, position=position)
    logits = asked(model, cache, chunks=(4, 1, 1))
    close(logits, asked(model, dense, chunks=(4, 1, 1)), torch.float32)
    assert error(logits, asked(model, together(model, [document(model, prefix, t) for t in texts], prefix))) > 1e-2


def test_a_document_may_choose_what_is_read() -> None:
    """Units of the document that a decode step needs: all of them is everything, a few are not."""
    model = models.double("llama")
    prefix, ids = prefixed(model), random_ids(1, 40, seed=9)[0]

    def logits(budget: float) -> torch.Tensor:
        plan = Plan("reading", model.fingerprint, read=Read(torch.full((model.geometry.layers,), budget), unit=4))
        cache = together(model, [document(model, prefix, ids, plan), document(model, prefix, TEXTS[0])], prefix)
        return asked(model, cache, chunks=(1, 1, 1, 1, 1, 1))

    full = together(model, [document(model, prefix, i) for i in (ids, TEXTS[0])], prefix)
    expected = asked(model, full)
    close(logits(1.0), expected)
    assert error(logits(0.2), expected) > 1e-3


def test_a_step_leaves_nothing_behind() -> None:
    """Rotations are worked out once a step for all layers of a document, and not held."""
    model = models.shared("llama")
    held = document(model, None, random_ids(1, 40, seed=8)[0], stored(model, "before-rope"))
    for chunks in ((6,), (4, 1, 1)):
        asked(model, together(model, [held], None), chunks=chunks)
        assert not held.segments[0].parts[0].lanes[0].rotary.tables


def test_layers_of_a_document_may_go_by_what_others_choose() -> None:
    """All layers read what the first one chose, at every decode step."""
    model = models.double("llama")
    layers = model.geometry.layers
    read_ = Read(torch.full((layers,), 0.3), unit=4, owner=torch.zeros(layers, dtype=torch.int32))
    held = document(model, None, random_ids(1, 40, seed=9)[0], Plan("owned", model.fingerprint, read=read_))
    cache = together(model, [held], None)
    asked(model, cache, chunks=(1, 1, 4))
    (context,) = cache.segments[0].contexts.documents
    assert context.layer.parts[0].lanes[0].reader.reads == 2


def test_a_question_leaves_no_choice_behind_for_the_next() -> None:
    """A choice that is kept for several steps is the asking cache's; the next cache, or branch, makes its own."""
    model = models.double("llama")
    prefix, ids, other = prefixed(model), random_ids(1, 40, seed=9)[0], random_ids(1, 6, seed=5)
    spec = Read(torch.full((model.geometry.layers,), 0.2), unit=4, period=0)

    def cache(held: SegmentCache) -> SegmentCache:
        return together(model, [held], prefix)

    def steps(cache: SegmentCache, question: torch.Tensor) -> torch.Tensor:
        return asked(model, cache, question, chunks=(1,) * 6)

    def held() -> SegmentCache:
        return document(model, prefix, ids, Plan("once", model.fingerprint, read=spec))

    alone = steps(cache(held()), other)
    both = held()
    assert error(steps(cache(both), QUESTION), alone) > 1e-3
    same(steps(cache(both), other), alone)
    begun = cache(held())
    asked(model, begun, QUESTION)
    steps(SegmentCache(model, prefix=begun), QUESTION)
    again = cache(held())
    asked(model, again, QUESTION)
    same(steps(SegmentCache(model, prefix=begun), other), steps(SegmentCache(model, prefix=again), other))


def test_what_follows_documents_stands_behind_them() -> None:
    """Also in a model that does not tell attention its positions; and other positions are refused."""
    model = models.shared("llama")
    cache = together(model, [document(model, None, TEXTS[0])], None)
    k = torch.zeros(1, model.geometry.kv_heads, 2, model.geometry.head_dim)
    q = torch.zeros(1, model.geometry.query_heads, 2, model.geometry.head_dim)
    cache.segments[0].attend(q, k, k, Attention(torch.nn.Identity(), 1.0, None, None, None, None))
    assert cache.segments[0].place == len(TEXTS[0]) + 2
    with pytest.raises(InputError, match="does not stand behind"):
        feed(model, together(model, [document(model, None, TEXTS[0])], None), QUESTION, [6])


def test_a_document_is_thinned_before_it_is_seen() -> None:
    model = models.double("llama")
    shape = (model.geometry.layers, model.geometry.kv_heads)
    keep = Keep.heads(torch.ones(shape), sink=0, recent=1, select=Select(torch.full(shape, 9.0), observed=4))
    held = read(model, SegmentCache(model, Plan("nine", model.fingerprint, keep=keep)), random_ids(1, 30, seed=8)[0])
    assert not held.finished
    cache = together(model, [held], None)
    assert cache.segments[0].place == 30
    asked(model, cache)
    assert held.entries().tolist() == [[9] * shape[1]] * shape[0]


def test_sinks_of_a_document_stay_as_near_as_its_window_has_them() -> None:
    """Positions inside the cache: 2 sinks and 5 recent entries of 20, so that sinks come 13 tokens nearer."""
    model = models.double("llama")
    nothing = torch.zeros(model.geometry.layers, model.geometry.kv_heads, dtype=torch.bool)
    keep = Keep.heads(nothing, sink=2, recent=5, position="reindex")
    held, raw = (document(model, None, random_ids(1, 20, seed=8)[0], plan) for plan in
                 (Plan("window", model.fingerprint, keep=keep), None))  # fmt: skip
    rotary = model.rotary(0)
    q = torch.randn(1, model.geometry.query_heads, 2, model.geometry.head_dim, dtype=torch.float64)
    k, v, _ = raw.segments[0].parts[0].lanes[0].recall()  # of layer 0, where windows have changed nothing yet
    stay, source = [0, 1, *range(15, 20)], torch.arange(2)[None]
    near = torch.cat([rotary.move(k[:, :, :2], source, source + 13), k[:, :, 15:]], dim=2)
    mine = Context(held, held.segments[0], 0, rotary).attend(q, torch.tensor([20, 21]), 0.3, None)
    for a, b in zip(mine, attend(q, near, v[:, :, stay], scale=0.3), strict=True):
        close(a, b, torch.float32)


def test_a_branch_sees_the_documents_too() -> None:
    """A question held once, and several answers."""
    model = models.shared("llama")
    prefix = prefixed(model)
    held = [document(model, prefix, ids) for ids in TEXTS]
    rows = random_ids(2, 3, seed=78)
    first = together(model, held, prefix)
    asked(model, first)
    branch = SegmentCache(model, prefix=first)
    made = feed(model, branch, rows, [3], shift=first.segments[0].place)
    for at in range(2):
        alone = together(model, held, prefix)
        both = asked(model, alone, torch.cat([QUESTION, rows[at : at + 1]], 1))
        close(made[at : at + 1], both[:, QUESTION.shape[1] :])


def test_tokens_on_trial_see_what_decoding_sees() -> None:
    model = models.shared("mistral-window")
    prefix = prefixed(model)
    held = [document(model, prefix, ids) for ids in TEXTS]
    decoded = asked(model, together(model, held, prefix), chunks=(3, 1, 1, 1))
    cache = together(model, held, prefix)
    asked(model, cache, QUESTION[:, :3])
    tried = feed(model, Trial(cache), QUESTION[:, 3:], [3], shift=cache.segments[0].place)
    close(tried, decoded[:, 3:])


def test_the_prefix_is_held_once() -> None:
    model = models.shared("llama")
    prefix = prefixed(model)
    held = [document(model, prefix, ids, stored(model, "four-bits")) for ids in TEXTS]
    alone = [owned(each) for each in held]
    assert [each.nbytes for each in held] == [prefix.nbytes + count for count in alone]
    cache = together(model, held, prefix)
    assert cache.nbytes == prefix.nbytes + sum(alone)
    asked(model, cache)
    assert cache.nbytes == prefix.nbytes + sum(alone) + owned(cache)
    assert cache.entries().tolist() == [[QUESTION.shape[1]] * model.geometry.kv_heads] * model.geometry.layers


def test_documents_stay_as_they_are() -> None:
    model = models.shared("llama")
    prefix = prefixed(model)
    held = [document(model, prefix, ids) for ids in TEXTS]
    first = asked(model, together(model, held, prefix))
    same(asked(model, together(model, held, prefix)), first)


@pytest.mark.parametrize("wrong", ["prefix", "other prefix", "plan of the prefix", "rows", "cut", "query", "padding"])
def test_what_cannot_be_put_together_is_refused(wrong: str) -> None:
    model = models.shared("llama")
    prefix = prefixed(model)
    held = [document(model, prefix, TEXTS[0])]
    mask, match = None, "read at other positions"
    if wrong == "prefix":
        prefix = None
    elif wrong == "other prefix":
        prefix = prefixed(model, PREFIX[:3])
    elif wrong == "plan of the prefix":
        prefix, match = read(model, SegmentCache(model, stored(model, "four-bits")), PREFIX), "as the model made it"
    elif wrong == "rows":
        held, match = [SegmentCache(model)], "one sequence"
        feed(model, held[0], random_ids(2, 5), [5], shift=len(PREFIX))
    elif wrong == "cut":
        spec = Read(torch.full((model.geometry.layers,), 0.5), cut="keys", apart=torch.zeros(model.geometry.layers))
        held, match = [document(model, prefix, TEXTS[0], Plan("cut", model.fingerprint, read=spec))], "goes by what is"
    elif wrong == "query":
        spec = Read(torch.full((model.geometry.layers,), 0.5), query="together")
        held, match = [document(model, prefix, TEXTS[0], Plan("asks", model.fingerprint, read=spec))], "goes by what is"
    elif wrong == "padding":
        mask, match = torch.tensor([[0, 1, 1]]), "cannot be padded"
    with pytest.raises(InputError, match=match):
        feed(model, together(model, held, prefix), random_ids(1, 3), [3], mask=mask)


def test_documents_are_not_put_before_what_was_read_without_them() -> None:
    """A prefix alone may be: it is the one that this was read after."""
    model = models.shared("llama")
    prefix = prefixed(model)
    held = document(model, prefix, TEXTS[0])
    cache = document(model, prefix, TEXTS[1])
    with pytest.raises(InputError, match="before what was read without them"):
        beside(model, cache, prefix, [held])
    assert after(model, cache, prefix) is cache
    alone = SegmentCache(model)
    feed(model, alone, TEXTS[1][None], [len(TEXTS[1])])
    with pytest.raises(InputError, match="other positions"):
        after(model, alone, prefix)
