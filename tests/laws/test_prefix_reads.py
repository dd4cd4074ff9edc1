"""Continuations of one prefix that choose what they read, each for itself: of the prefix, held once, as of their own.

The law that they read what each would alone is in `test_prefix.py`, for a prefix of one level.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share import tree
from kvtool.cache.share.grafted import Grafted
from kvtool.cache.share.together import feed as feed_all
from kvtool.cache.share.together import held
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Keep, Select
from tests import models
from tests.laws.readings import reading
from tests.laws.stores import stored
from tests.laws.test_prefix import CONTINUATION, ROWS, TOKENS, equals_separate, fed, prefixed
from tests.models import random_ids
from tests.running import own
from tests.tolerance import close

FEW = ["minmax", "own-jumps", "followed-tails", "segment-tails", "sentence-rest", "exact-outliers", "asked-documents",
       "asked-mean", "two-levels", "slow"]  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_a_tree_of_prefixes(name: str) -> None:
    """A branch of one row is itself a prefix, whose own units are shared besides those before; also one fed nothing."""
    model = models.double("llama")
    plan = reading(model, name)
    trunk, limb, leaves = random_ids(1, 22, seed=1), random_ids(1, 13, seed=2), random_ids(ROWS, 9, seed=3)
    first = prefixed(model, plan, trunk)
    second = SegmentCache(model, plan, prefix=SegmentCache(model, plan, prefix=first))
    fed(model, second, limb, [8, *[1] * 5])
    third = SegmentCache(model, plan, prefix=second)
    together = fed(model, third, leaves, [4, *[1] * 5])
    for row in range(ROWS):
        alone = prefixed(model, plan, trunk)
        fed(model, alone, limb, [8, *[1] * 5])
        close(together[row : row + 1], fed(model, alone, leaves[row : row + 1], [4, *[1] * 5]))
    bulk = third.segments[-1].parts[0].lanes[0].bulk  # type: ignore[union-attr]
    assert isinstance(bulk, Grafted)
    assert [piece.length > 0 for piece in bulk.shared] == [True, True]


@pytest.mark.parametrize("protocol", ["official", "strict"])
@pytest.mark.parametrize("store", ["two-bits", "before-rope", "mixed"])
@pytest.mark.parametrize("name", ["minmax", "segment-tails", "slow", "asked-mean"])
def test_a_coded_bulk(name: str, store: str, protocol: str) -> None:
    model = models.double("llama")
    made = reading(model, name)
    assert made.read is not None
    made = replace(made, read=replace(made.read, unit=8), store=stored(model, store).store)
    equals_separate(model, made, 37, protocol)


@pytest.mark.parametrize("name", ["minmax", "wave", "sentences", "asked-mean", "rest"])
def test_what_a_selection_leaves(name: str) -> None:
    """At true positions, and bare where these are asked for."""
    model = models.double("llama")
    nothing = torch.zeros(3, 2)
    select = Select(torch.full((3, 2), 0.8), observed=4, spread="layer")
    keep = Keep(nothing.int(), nothing.int() - 1, nothing.to(torch.uint8), select=select)
    equals_separate(model, replace(reading(model, name), keep=keep), 37)


@pytest.mark.parametrize("name", FEW)
def test_reading_everything_is_dense(name: str) -> None:
    model = models.shared("llama")
    made = reading(model, name)
    assert made.read is not None
    made = replace(made, read=replace(made.read, budget=torch.full((3,), 1e6)))
    prefix, rows = random_ids(1, 21, seed=1), random_ids(ROWS, TOKENS, seed=2)
    cache = SegmentCache(model, made, prefix=prefixed(model, made, prefix))
    expected = own(model, torch.cat([prefix.expand(ROWS, -1), rows], 1))[:, 21:]
    close(fed(model, cache, rows, CONTINUATION), expected)


@pytest.mark.parametrize("name", FEW)
def test_rows_can_be_selected_and_repeated(name: str) -> None:
    model = models.double("llama")
    made, ids, order = reading(model, name), random_ids(3, 10, seed=8), torch.tensor([2, 0, 0, 1])
    shared = prefixed(model, made, random_ids(1, 30, seed=1))
    cache = SegmentCache(model, made, prefix=shared)
    fed(model, cache, ids[:, :6], [2, *[1] * 4])
    cache.reorder_cache(order)
    after = fed(model, cache, ids[order, 6:], [1] * 4)
    expected = fed(model, SegmentCache(model, made, prefix=shared), ids, [2, *[1] * 8])[:, 6:]
    close(after, expected[order])


def _readers(cache: SegmentCache) -> list:
    return [lane.reader for layer in cache.segments for lane in layer.lanes() if getattr(lane, "reader", None)]


@pytest.mark.parametrize("name", FEW)
def test_what_the_prefix_holds_is_held_once(name: str) -> None:
    """By identity: of what a prefix holds a continuation copies sinks that lack, recent entries and who reads them, and
    of units those that its own entries may join. Summaries of the prefix are the prefix's own tensors."""
    model = models.shared("llama")
    made = reading(model, name)
    shared = prefixed(model, made, random_ids(1, 600, seed=1))
    caches = [SegmentCache(model, made, prefix=shared) for _ in range(3)]
    theirs = {id(buffer): buffer.nbytes for buffer in shared.buffers()}
    for at, cache in enumerate(caches):
        fed(model, cache, random_ids(4, 6, seed=at), [5, 1])
        mine = {id(buffer): buffer.nbytes for buffer in cache.buffers()}
        assert cache.nbytes == sum(mine.values())  # nothing twice
        kept = {id(x) for lane in shared._all() for x in (*lane.bulk.buffers(), *lane.sinks.buffers())}
        kept |= {
            id(x) for reader in _readers(shared) for x in (*reader.units.parts, reader.units.labels) if x is not None
        }
        assert kept <= set(mine)
    each = [cache.nbytes for cache in caches]
    common = sum(theirs[i] for i in theirs if all(i in {id(b) for b in cache.buffers()} for cache in caches))
    assert held(caches) == sum(each) - 2 * common
    alone = feed_alone(model, made, rows=4).nbytes
    assert each[0] < 0.6 * alone  # of four rows, which share all but some tokens and what they fetched


def feed_alone(model: Model, made: Plan, rows: int, length: int = 600) -> SegmentCache:
    """Rows that each hold the prefix."""
    cache = SegmentCache(model, made)
    prefix = random_ids(1, length, seed=1).expand(rows, -1)
    fed(model, cache, prefix, [length])
    cache.finish()
    fed(model, cache, random_ids(rows, 6), [5, 1])
    return cache


@pytest.mark.parametrize("name", ["minmax", "tokens", "slow", "wave", "two-levels", "own-jumps", "keys"])
def test_bytes_that_a_step_reads(name: str) -> None:
    """Of one row, what that row reads alone; of several, the choice of each, but sinks and summaries only once."""
    model = models.double("llama")
    made = reading(model, name)
    shared = prefixed(model, made, random_ids(1, 200, seed=1))
    rows, single = random_ids(4, 6), []
    pieces = 8 * len(model.geometry.windows)  # each counts whole bytes
    for row in rows:
        cache, alone = SegmentCache(model, made, prefix=shared), prefixed(model, made, random_ids(1, 200, seed=1))
        for each in (cache, alone):
            fed(model, each, row[None], [5, 1])
        assert abs(cache.read_bytes - alone.read_bytes) <= pieces
        assert cache.moved_bytes == alone.moved_bytes - shared.moved_bytes
        single.append(cache.read_bytes)
    cache = SegmentCache(model, made, prefix=shared)
    fed(model, cache, rows, [5, 1])
    once = sum(lane.sinks.read_bytes() for lane in shared._all())  # type: ignore[attr-defined]
    summaries = sum(reader.units.summary_bytes() for reader in _readers(shared))
    if name in ("minmax", "tokens"):  # which look at all summaries at every step
        assert abs(cache.read_bytes - (sum(single) - 3 * (once + summaries))) <= pieces
    assert cache.read_bytes <= sum(single) - 3 * once + pieces


@pytest.mark.parametrize("name", ["followed", "followed-clusters", "minmax", "asked-each", "segments"])
def test_a_pass_over_branches_of_a_tree(name: str) -> None:
    """Every branch's layers tell one another what they chose, and nobody else's; sinks that move are each query's."""
    model = models.double("llama")
    made = reading(model, name)
    trunk = random_ids(1, 40, seed=1)[0]
    prompts = [torch.cat([trunk, random_ids(1, n, seed=n)[0]]) for n in (3, 9, 9, 22)]
    branches = tree.read(model, prompts, made, least=4)
    caches = [branch.cache for branch in branches]
    pieces = [torch.stack([prompts[at][-1:] for at in branch.prompts]) for branch in branches]
    order = [at for branch in branches for at in branch.prompts]
    found = []
    for _ in range(4):
        logits = feed_all(model, caches, pieces)
        found.append(torch.cat(logits))
        pieces = [row.argmax(-1, keepdim=True).cpu() for row in logits]
    boards = [cache.board for cache in caches]
    assert len({id(board) for board in boards}) == len(boards)
    assert not any(board.posts for board in boards)
    for at, number in enumerate(order):
        alone = prefixed(model, made, trunk[None])
        fed(model, alone, prompts[number][None, 40:-1], [len(prompts[number]) - 41])
        token = prompts[number][None, -1:]
        for step in found:
            logits = fed(model, alone, token, [1])[:, -1]
            close(step[at : at + 1], logits)
            token = logits.argmax(-1, keepdim=True)
