"""Entries that are no tokens': every later query sees them, whatever the plan does with tokens."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.trial import Trial
from kvtool.errors import InputError
from kvtool.model import Model
from tests import models
from tests.laws.methods import ragged
from tests.laws.test_compositions import across_layers, bits
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, error

PREFIX, TOKENS = 12, 20
IDS = random_ids(2, PREFIX + TOKENS, seed=4)
Entries = list[tuple[torch.Tensor, torch.Tensor]]


def produced(model: Model) -> Entries:
    """The entries that a prefix leaves, in any order."""
    cache, order = SegmentCache(model), torch.randperm(PREFIX, generator=torch.Generator().manual_seed(0))
    feed(model, cache, IDS[:, :PREFIX], [PREFIX])
    held = [next(layer.lanes()).recall() for layer in cache.segments]
    return [(k[:, :, order], v[:, :, order]) for k, v, _ in held]


@pytest.mark.parametrize("chunks", [[20], [7, 5, *[1] * 8], [1] * 20], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_inserting_what_a_prefix_left_is_having_fed_it(name: str, chunks: list[int]) -> None:
    model = models.shared(name)
    cache = SegmentCache(model)
    cache.insert(produced(model))
    got = feed(model, cache, IDS[:, PREFIX:], chunks, shift=PREFIX)
    close(got, own(model, IDS)[:, PREFIX:])
    assert cache.get_seq_length() == TOKENS
    assert cache.entries().tolist() == [[TOKENS] * model.geometry.kv_heads] * model.geometry.layers


def test_they_may_come_bit_by_bit_and_later() -> None:
    model = models.shared("llama")
    entries, cache = produced(model), SegmentCache(model)
    cache.insert([(k[:, :, :5], v[:, :, :5]) for k, v in entries])
    cache.insert([(k[:, :, 5:], v[:, :, 5:]) for k, v in entries])
    close(feed(model, cache, IDS[:, PREFIX:], [9, *[1] * 11], shift=PREFIX), own(model, IDS)[:, PREFIX:])
    late = SegmentCache(model)
    before = feed(model, late, IDS[:, PREFIX : PREFIX + 6], [6], shift=PREFIX)
    late.insert(entries)
    with model.served(), torch.no_grad():
        places = torch.arange(PREFIX + 6, PREFIX + TOKENS).expand(2, -1)
        after = model.network(input_ids=IDS[:, PREFIX + 6 :], past_key_values=late, position_ids=places).logits
    close(before, feed(model, SegmentCache(model), IDS[:, PREFIX:], [20], shift=PREFIX)[:, :6])
    assert error(after, own(model, IDS)[:, PREFIX + 6 :]) > 0.1  # the first six tokens never saw them


def test_no_plan_touches_them() -> None:
    model = models.double("llama")
    entries = produced(model)
    for plan in (ragged(model), bits(model, 2), across_layers(model)):
        cache, bare = SegmentCache(model, plan), SegmentCache(model, plan)
        cache.insert(entries)
        for each in (cache, bare):
            feed(model, each, IDS[:, PREFIX:], [12, *[1] * 8], shift=PREFIX)
        size = sum(x.nbytes for pair in entries for x in pair)
        assert cache.nbytes - bare.nbytes == cache.read_bytes - bare.read_bytes == size
        assert cache.entries().tolist() == bare.entries().tolist()


def test_rows_trials_and_prefixes_keep_them() -> None:
    model = models.double("llama")
    entries = produced(model)
    cache = SegmentCache(model)
    cache.insert(entries)
    feed(model, cache, IDS[:, PREFIX:-1], [19], shift=PREFIX)
    cache.batch_select_indices(torch.tensor([1, 0]))
    place = torch.full((2, 1), PREFIX + 19)
    with model.served(), torch.no_grad():
        got = model.network(input_ids=IDS[[1, 0], -1:], past_key_values=cache, position_ids=place).logits
    close(got[:, 0], own(model, IDS)[[1, 0], -1])
    one = SegmentCache(model)
    one.insert([(k[:1], v[:1]) for k, v in entries])
    feed(model, one, IDS[:1, PREFIX:-1], [19], shift=PREFIX)
    for follower in (Trial(one), SegmentCache(model, prefix=one)):
        with model.served(), torch.no_grad():
            got = model.network(input_ids=IDS[:1, -1:], past_key_values=follower, position_ids=place[:1]).logits
        close(got[:, 0], own(model, IDS)[:1, -1])


def test_reset_forgets_them_and_other_shapes_are_refused() -> None:
    model = models.shared("llama")
    entries, cache = produced(model), SegmentCache(model)
    cache.insert(entries)
    cache.reset()
    assert cache.nbytes == 0
    cache.insert([(k[:, :, :0], v[:, :, :0]) for k, v in entries])
    close(feed(model, cache, IDS, [32]), own(model, IDS))
    with pytest.raises(InputError, match="another shape"):
        cache.insert(entries[:1])
    with pytest.raises(InputError, match="another shape"):
        cache.insert([(k[:, :1], v[:, :1]) for k, v in entries])
