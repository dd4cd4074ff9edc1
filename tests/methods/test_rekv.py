"""Known answers of ReKV, card C11, and a planted document; queries, places: tests/cache/read/test_asking.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan, compose
from tests import models
from tests.laws.methods import plan
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error

DOCUMENTS = ("aaaabbbb;", "ccccdddd;", "eeeeffff;", "gggghhhh;")


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[ord(letter) for letter in text]])


def single() -> Model:
    """One layer, whose keys and values depend on the tokens alone."""
    model = models.shallow("llama")
    model.network.to(torch.float64)
    return models.with_tokenizer(model)


def made(model: Model, **settings: object) -> Plan:
    options = dict(blocks="documents", marks=";", asked=8, budget=9, sink=3, recent=9) | settings
    return calibrate("rekv", options, model=model)


def retrieved(cache: SegmentCache, layer: int = 0) -> list[list[int]]:
    """Tokens that each KV head of a layer reads, besides sinks and recent ones, in order."""
    (lane,) = cache.segments[layer].lanes()
    choice = lane.reader.choice[0, :, 0].flip(-1)
    return (choice + lane.sinks.length).tolist()


@pytest.mark.parametrize("asked", range(4))
def test_the_document_that_the_question_is_about(asked: int) -> None:
    """A question in the words of one document fetches that one, where keys ask for what they are themselves."""
    model = single()
    attention = model.network.model.layers[0].self_attn
    by_head = attention.k_proj.weight.unflatten(0, (model.geometry.kv_heads, -1))
    attention.q_proj.weight.copy_(by_head.repeat_interleave(model.geometry.group, 0).flatten(0, 1))
    model.network.model.embed_tokens.weight[97:105] = 7 * torch.eye(8, model.geometry.hidden)  # "a" to "h", alike long
    text, words = "zzz" + "".join(DOCUMENTS), DOCUMENTS[asked][:-1]
    cache = SegmentCache(model, made(model, budget=8))
    feed(model, cache, ids(text + words + "z"), [len(text + words), 1])
    first = 3 + 9 * asked
    assert retrieved(cache) == [list(range(first, first + 8))] * model.geometry.kv_heads


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_what_was_retrieved_is_the_context(positions: str) -> None:
    """With fresh positions the answer is that of the model itself to [sinks | retrieved | question, answer]."""
    model = single()
    text = "zzz" + "".join(DOCUMENTS) + "which one"
    cache = SegmentCache(model, made(model, positions=positions, budget=14))
    logits = feed(model, cache, ids(text + "abcd"), [len(text), 1, 1, 1, 1])
    (lane,) = cache.segments[0].lanes()
    read = retrieved(cache)[0]
    assert read == sorted(read)
    recent = range(len(text) + 3 - lane.recent.length, len(text) + 4)  # one has left since
    context = "".join((text + "abcd")[at] for at in [*range(3), *read, *recent])
    expected = own(model, ids(context))[:, -1]
    if positions == "contiguous":
        close(logits[:, -1], expected, torch.float32)
    else:
        assert error(logits[:, -1], expected) > 1e-2


def test_each_question_retrieves_once() -> None:
    model = models.double("llama")
    cache = SegmentCache(model, plan("rekv", model, dict(budget=8, unit=4, asked=4, sink=1, recent=3)))
    looks = []
    for chunk in (30, 1, 1, 1, 6, 1, 1):
        feed(model, cache, random_ids(1, chunk, seed=chunk), [chunk], shift=cache.get_seq_length())
        looks.append(next(cache.segments[1].lanes()).reader.looks)
    assert looks == [0, 2, 2, 2, 2, 4, 4]  # of two KV heads


def test_nothing_is_fetched_again_for_the_same_question() -> None:
    model, moved = models.double("llama"), []
    cache = SegmentCache(model, plan("rekv", model, dict(budget=8, unit=4, asked=4, sink=1, recent=6)))
    for chunk in (27, 1, 1):
        feed(model, cache, random_ids(1, chunk, seed=chunk), [chunk], shift=cache.get_seq_length())
        moved.append(cache.moved_bytes)
    entry = 2 * model.geometry.head_dim * 8
    assert moved == [0, *[8 * entry * model.geometry.kv_heads * model.geometry.layers] * 2]


def test_layers_retrieve_by_themselves() -> None:
    model = models.double("llama")
    cache = SegmentCache(model, plan("rekv", model, dict(budget=8, unit=2, asked=4, sink=1, recent=3)))
    feed(model, cache, random_ids(1, 60, seed=4), [59, 1])
    assert len({tuple(retrieved(cache, layer)[0]) for layer in range(3)}) > 1


def test_documents_need_marks_and_a_tokenizer() -> None:
    model = models.with_tokenizer(models.shared("llama"))
    read = made(model, marks=(";", "z")).read
    assert read is not None
    assert read.ends is not None
    assert "".join(map(chr, read.ends)) == ";z"
    with pytest.raises(InputError, match="no token ends a document"):
        made(model, marks=("§",))
    with pytest.raises(InputError, match="by their tokens"):
        made(models.shared("llama"))


def test_fresh_positions_after_a_selection_are_refused() -> None:
    model = models.shared("llama")
    fewer = plan("snapkv", model, dict(budget=0.5))
    assert compose(plan("rekv", model, {}), fewer).keep is fewer.keep
    with pytest.raises(InputError, match="moved together"):
        compose(plan("rekv", model, dict(positions="contiguous")), fewer)
