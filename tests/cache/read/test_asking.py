"""What chooses, where it is not a step's own query, and where what is read stands: cuts, adopted prompts, trials."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.asking import Asking, recorded, weights
from kvtool.cache.read.credits import Credits
from kvtool.cache.read.places import Places
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.trial import Trial
from kvtool.errors import InputError
from kvtool.plan import Plan
from kvtool.rotary import NONE
from kvtool.slots import Keep, Select
from tests import models
from tests.cache.read.test_reader import D, G, K, draw, reading, spec
from tests.laws import readings
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same

NAMES = ("asked", "asked-each", "probe", "usual-probe", "attended", "graph")
IDS = random_ids(1, 34, seed=12)


def asking(**changes: Any) -> Asking:
    read = spec(**changes)
    return Asking(read, None, Places(read, NONE))


def told(made: Asking, q: torch.Tensor, start: int) -> None:
    """Tokens with queries q [1,H,T,D] have come."""
    made.receive(q, draw(1, K, q.shape[2], D), Step(start, 1.0))


@pytest.mark.parametrize("cut", [[9], [4, 5], [2, 2, 2, 3]], ids=str)
def test_a_question_is_its_last_tokens_however_it_is_cut(cut: list[int]) -> None:
    q, made, start = draw(1, K * G, 9, D), asking(query="together", asked=6), 0
    for piece in q.split(cut, 2):
        told(made, piece, start)
        start += piece.shape[2]
    own = draw(1, K, G, D, seed=1)
    close(made.query(own, Step(9, 1.0)), q[:, :, 3:].mean(2).unflatten(1, (K, G)))


def test_what_is_decoded_has_no_say_and_a_new_question_is_alone() -> None:
    first, answer, second = (draw(1, K * G, 3, D, seed=seed) for seed in range(3))
    made = asking(query="together", asked=5)
    told(made, first, 0)
    for at in range(3):
        told(made, answer[:, :, at : at + 1], 3 + at)
    own = draw(1, K, G, D)
    close(made.query(own, Step(6, 1.0)), first.mean(2).unflatten(1, (K, G)))
    told(made, second, 6)
    close(made.query(own, Step(9, 1.0)), second.mean(2).unflatten(1, (K, G)))


def test_a_choice_is_made_once_for_each_question() -> None:
    reader, bulk = reading(spec(summary="mean", query="together", period=0), draw(1, K, 32, D), draw(1, K, 32, D))
    looks = []
    for tokens in (7, 1, 1, 4, 3, 1, 1):
        q = draw(1, K * G, tokens, D, seed=tokens)
        reader.receive(q, draw(1, K, tokens, D), Step(32, 1.0))
        if tokens == 1:
            reader.attend(q, bulk, Step(32, 1.0))
            looks.append(reader.looks // K)
    assert looks == [1, 1, 2, 2]


def test_queries_that_are_all_alike_say_the_same() -> None:
    q = draw(1, K, G, 1, D).expand(-1, -1, -1, 5, -1)
    close(weights(q, q[0, :, :, 0], torch.zeros(K, G, D)), torch.full((1, 5), 0.2))
    made = asking(query="probe", asked=4)
    told(made, q.flatten(1, 2), 0)
    close(made.query(q[:, :, :, 0], Step(5, 1.0)), q[:, :, :, 0])


def test_the_more_unusual_a_query_the_more_it_says() -> None:
    """Mean 0, variance 1: φ is the mean square over 1.01, here as 1 : 4 : 0."""
    q = torch.tensor([1.0, 2.0, 0.0])[:, None].expand(1, K, G, 3, D)
    close(weights(q, torch.zeros(K, G, D), torch.ones(K, G, D)), torch.tensor([[0.2, 0.8, 0.0]]))


@pytest.mark.parametrize("cut", [[12], [5, 7], [1, 4, 1, 6]], ids=str)
def test_credits_do_not_depend_on_the_cut(cut: list[int]) -> None:
    """Row i gives shares of 1 to the three entries up to its own; rows 0 and 1 have fewer to give to."""
    q, k = draw(1, K * G, 12, D), draw(1, K, 12, D, seed=1)
    made, start, scale = Credits(3), 0, D**-0.5
    for piece in q.split(cut, 2):
        high = start + piece.shape[2]
        made.receive(piece, k[:, :, start:high], k[:, :, :high], Step(start, scale))
        start = high
    expected = torch.zeros(1, K, 12)
    for row in range(12):
        near = slice(max(0, row - 2), row + 1)
        logits = scale * q[:, :, row].unflatten(1, (K, G)) @ k[:, :, near].mT
        expected[:, :, near] += logits.softmax(-1).sum(2)
    assert made.sums is not None
    close(made.sums, expected)
    close(made.sums.sum(-1), torch.full((1, K), 12.0 * G))


def test_the_keys_attended_most_stand_for_a_block() -> None:
    k, at = draw(1, K, 8, D), [2, 5]
    read = spec(summary="attended", rank=1, unit=4, recent=8)
    reader, _ = reading(read, k[:, :, :0], k[:, :, :0])
    q = torch.zeros(1, K * G, 8, D)
    q[:, :, 7] = 9 * (k[:, :, at[0]] + k[:, :, at[1]]).repeat_interleave(G, 1)
    reader.receive(q, k, Step(0, 1.0), k)
    first = reader.credits.sums.unflatten(2, (2, 4)).argmax(-1)
    reader.append(k, k)
    for unit in range(2):
        picked = 4 * unit + first[0, :, unit]
        close(reader.units.parts[0][0, :, unit], k[0, torch.arange(K), picked])


@pytest.mark.parametrize("name", NAMES)
def test_an_adopted_prompt_is_a_fed_one(name: str) -> None:
    model = models.double("llama")
    made = readings.reading(model, name)
    full, fed = SegmentCache(model), SegmentCache(model, made)
    full.record_for(made)
    feed(model, full, IDS[:, :26], [26])
    adopted = SegmentCache(model, made)
    adopted.adopt(full)
    expected = feed(model, fed, IDS, [26, *[1] * 8])[:, 26:]
    with model.served(), torch.no_grad():
        rest = [model.network(input_ids=x, past_key_values=adopted).logits for x in IDS[:, 26:].split(1, 1)]
    close(torch.cat(rest, dim=1), expected)


@pytest.mark.parametrize("name", ["asked-each", "usual-probe"])
def test_a_token_on_trial_stands_where_it_will(name: str) -> None:
    """One at a time, as a draft tries them; its own query has no say in what is read before it is kept."""
    model = models.double("llama")
    made = once(readings.reading(model, name))
    cache, fed = SegmentCache(model, made), SegmentCache(model, made)
    expected = feed(model, fed, IDS, [20, *[1] * 14])
    feed(model, cache, IDS[:, :21], [20, 1])
    trial = Trial(cache)
    with model.served(), torch.no_grad():
        for at in range(21, 26):
            out = model.network(input_ids=IDS[:, at : at + 1], past_key_values=trial).logits
            close(out, expected[:, at : at + 1], torch.float32)


def once(made: Plan) -> Plan:
    """The same, which chooses once."""
    assert made.read is not None
    return replace(made, read=replace(made.read, period=0, unit=8))


def test_entries_side_by_side_need_no_gap() -> None:
    """Elements 7, 5 and 2 of two entries each, of 16: their keys stand at 10 to 15, in order."""
    model = models.double("llama")
    read, rotary = spec(positions="contiguous", unit=2), model.rotary(0)
    k = draw(1, K, 1, D).double().expand(-1, -1, 6, -1)
    places = Places(read, rotary)
    held = rotary.rotate(k, rotary.table(torch.tensor([14, 15, 10, 11, 4, 5])))
    moved = places.keys(held, torch.tensor([7, 5, 2]).expand(1, K, 1, 3), 2, 16)
    close(moved, rotary.rotate(k, rotary.table(torch.tensor([14, 15, 12, 13, 10, 11]))), torch.float32)


def test_what_is_far_stands_at_one_distance() -> None:
    """The product of a query and a far key does not depend on where either stands."""
    model = models.double("llama")
    rotary = model.rotary(0)
    places, products = Places(spec(positions="far", unit=1, recent=9), rotary), []
    bare_k, bare_q = draw(1, K, 1, D).double(), draw(1, K, 1, D, seed=1).double()
    for at, entry in ((20, 3), (31, 3), (31, 12)):
        k = rotary.rotate(bare_k, rotary.table(torch.tensor([entry])))
        q = rotary.rotate(bare_q, rotary.table(torch.tensor([at])))
        far = places.keys(k, torch.full((1, K, 1, 1), entry), 1, 16)
        products.append(places.query(q, Step(at, 1.0)) @ far.mT)
    turned = rotary.rotate(bare_q, rotary.table(torch.tensor([9])))
    for product in products:
        close(product, turned @ rotary.rotate(bare_k, rotary.table(torch.tensor([0]))).mT, torch.float32)


def test_refused() -> None:
    for changes, match in (
        (dict(asked=0), "bad reading"),
        (dict(bare=True, form="cluster", summary="mean"), "no logits"),
        (dict(heads="layer", form="cluster", summary="mean"), "the same units"),
        (dict(positions="far", tail="mean"), "its own distance"),
    ):
        with pytest.raises(InputError, match=match):
            spec(**changes)
    for changes in (dict(cosine=True), dict(bare=True, summary="keys")):
        with pytest.raises(InputError, match="no vector to compare"):
            reading(spec(**changes), draw(1, K, 32, D), draw(1, K, 32, D))
    full = Keep(torch.zeros(1, K).int(), torch.full((1, K), -1).int(), torch.zeros(1, K).to(torch.uint8))
    thinned = Keep(full.sink, full.recent, full.compensate, select=Select(torch.full((1, K), 0.5)))
    with pytest.raises(InputError, match="moved together"):
        spec(positions="contiguous").check(thinned)


def test_a_choice_is_of_all_heads_together() -> None:
    """Head 0 asks for the first block with 1, head 1 for the second with 3: both read the second."""
    k = torch.eye(D)[:2].repeat_interleave(4, 0).expand(1, K, 8, D).contiguous()
    q = torch.zeros(1, K, G, D)
    q[:, 0, :, 0], q[:, 1, :, 1] = 1.0, 3.0
    reader, bulk = reading(spec(summary="mean", heads="layer", budget=torch.tensor([4.0])), k, k)
    reader.attend(q.flatten(1, 2)[:, :, None], bulk, Step(8, 1.0))
    assert reader.choice is not None
    same(reader.choice, torch.ones(1, K, 1, 1).long())
    by_head, bulk = reading(spec(summary="mean", heads="mean", budget=torch.tensor([4.0])), k, k)
    by_head.attend(q.flatten(1, 2)[:, :, None], bulk, Step(8, 1.0))
    assert by_head.choice is not None
    assert by_head.choice.flatten().tolist() == [0, 1]


def test_a_cosine_does_not_see_lengths() -> None:
    k = torch.eye(D)[:2].repeat_interleave(4, 0) * torch.tensor([1.0] * 4 + [9.0] * 4)[:, None]
    k = k.expand(1, K, 8, D).contiguous()
    q = torch.tensor([3.0, 1.0, *[0.0] * (D - 2)]).expand(1, K * G, 1, D)
    picked = []
    for cosine in (False, True):
        reader, bulk = reading(spec(summary="mean", heads="layer", cosine=cosine, budget=torch.tensor([4.0])), k, k)
        reader.attend(q, bulk, Step(8, 1.0))
        assert reader.choice is not None
        picked.append(int(reader.choice[0, 0, 0, 0]))
    assert picked == [1, 0]


@pytest.mark.parametrize(
    ("changes", "queries"),
    [({}, 0), (dict(query="together", asked=7), 7), (dict(query="probe", asked=7), -1), (dict(summary="attended"), -1),
     (dict(query="probe", asked=7, usual=torch.ones(1, K, G, 2, D)), 7), (dict(bare=True), 0),
     (dict(unit=1, index="graph", search=readings.GRAPH), -1),
     (dict(unit=1, index="cluster", search=dict(entries=2, scan=0.5)), 0)],
    ids=str,
)  # fmt: skip
def test_how_many_queries_of_a_prompt_are_needed(changes: dict[str, Any], queries: int) -> None:
    assert recorded(spec(**changes)) == queries
