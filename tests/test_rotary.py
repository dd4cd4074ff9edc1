"""RoPE whose angles follow the length: exact as long as they stand still, refused beyond, never silently wrong."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.rotary import Rotary
from kvtool.slots import Keep, Store
from tests import models
from tests.models import LONG, STRETCHED, random_ids
from tests.running import feed, own
from tests.tolerance import close, error, same

EACH = pytest.mark.parametrize("name", STRETCHED)
WHOLE = torch.ones(3, 2, dtype=torch.bool)


def before_rope(model: Model, recent: int = 2) -> Plan:
    """Holds keys before RoPE as they are: nothing is lost."""
    return Plan("test", model.fingerprint, store=Store((Encoding(rotated=False),), (Encoding(),),
                                                       torch.zeros(3, 2).int(), recent=recent, block=2))  # fmt: skip


def reindexed(model: Model) -> Plan:
    return Plan("test", model.fingerprint, keep=Keep.heads(~WHOLE, sink=2, recent=8, position="reindex"))


@EACH
def test_where_angles_begin_to_follow_the_length(name: str) -> None:
    model = models.build(name)
    for layer in range(3):
        assert model.rotary(layer).steady == LONG
    assert models.shared("rope-yarn").rotary(0).steady is None
    assert models.shared("gemma3").rotary(0).steady is None


@EACH
def test_texts_that_are_short_enough_are_exact(name: str) -> None:
    model = models.build(name)
    ids, chunks = random_ids(2, LONG, seed=3), [LONG - 6, *[1] * 6]
    close(feed(model, SegmentCache(model, before_rope(model)), ids, chunks), own(model, ids, chunks))
    feed(model, SegmentCache(model, reindexed(model)), ids, chunks)


@EACH
@pytest.mark.parametrize("chunks", [[LONG - 4, *[1] * 12], [LONG + 8, 1]])
def test_longer_texts_are_refused_where_keys_are_turned_back(name: str, chunks: list[int]) -> None:
    model = models.build(name)
    ids = random_ids(1, sum(chunks), seed=4)
    for plan in (before_rope(model), before_rope(model, recent=30), reindexed(model)):
        with pytest.raises(InputError, match="RoPE turns keys otherwise"):
            feed(model, SegmentCache(model, plan), ids, chunks)


@EACH
def test_longer_texts_whose_keys_stay_as_they_came(name: str) -> None:
    ids, chunks = random_ids(1, 3 * LONG, seed=5), [2 * LONG, *[1] * LONG]
    expected = own(models.build(name), ids, chunks)
    for store in (None, Store((Encoding(),), (Encoding(),), torch.zeros(3, 2).int(), recent=2, block=2)):
        model = models.build(name)  # dynamic angles stay at those of the longest text so far
        close(feed(model, SegmentCache(model, Plan("test", model.fingerprint, store=store)), ids, chunks), expected)
    model = models.build(name)
    assert error(feed(model, SegmentCache(model), ids[:, :LONG], [LONG]), expected[:, :LONG]) > 1e-3


@EACH
def test_a_short_text_after_a_long_one(name: str) -> None:
    model = models.build(name)
    ids = random_ids(1, 2 * LONG, seed=6)
    fresh = feed(model, SegmentCache(model, before_rope(model)), ids[:, :20], [14, *[1] * 6])
    feed(model, SegmentCache(model), ids, [2 * LONG])
    with pytest.raises(InputError, match="RoPE turns keys otherwise"):
        model.rotary(0).table(torch.arange(3))
    same(feed(model, SegmentCache(model, before_rope(model)), ids[:, :20], [14, *[1] * 6]), fresh)


@EACH
def test_keys_of_a_text_that_is_fed_at_once(name: str) -> None:
    """As statistics see them: turned back by the angles that they were turned by."""
    model = models.build(name)
    cache, token = SegmentCache(model), torch.full((1, 2 * LONG), 9)
    feed(model, cache, token, [2 * LONG])
    rotary = model.rotary(0)
    keys = next(cache.segments[0].lanes()).recall()[0]
    bare = rotary.unrotate(keys, rotary.table(torch.arange(2 * LONG), at_once=True))
    close(bare, bare[:, :, :1].expand_as(bare))


def test_layers_turn_a_step_by_tables_that_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = models.shared("llama"), []
    cache, ids = SegmentCache(model, reindexed(model)), random_ids(1, 40, seed=1)
    feed(model, cache, ids[:, :32], [30, 1, 1])
    angles = Rotary._angles
    monkeypatch.setattr(Rotary, "_angles", lambda self, positions: calls.append(1) or angles(self, positions))
    feed(model, cache, ids[:, 32:], [1] * 8, shift=32)
    assert len(calls) == 8 * 2 < 8 * 2 * model.geometry.layers  # from where the query stands, to where it would
    branch = SegmentCache(model, cache.plan, prefix=cache)
    feed(model, branch, random_ids(1, 100, seed=2), [1] * 100, shift=40)
    assert not cache.board.tables  # a step's are not kept
    assert not branch.board.tables
