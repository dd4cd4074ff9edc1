"""What one reader chooses, reads and counts: planted needles, known answers of the papers, bytes by arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from kvtool import registry
from kvtool.cache.lane import Step
from kvtool.cache.read.board import Board, Place
from kvtool.cache.read.clusters import clustered, means
from kvtool.cache.read.reader import Reader
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.segments import Dense
from kvtool.errors import InputError
from kvtool.slots import Keep, Read, Select
from kvtool_kernels.ops import attend
from tests.tolerance import close, same

K, G, D, S, UNIT = 2, 3, 8, 32, 4
STEP = Step(0, D**-0.5)
ENTRY = 2 * D * 4  # bytes of a key and a value
SUMMARIES = registry.names("cache/read/summaries")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec(**changes: Any) -> Read:
    options: dict[str, Any] = dict(budget=torch.tensor([0.25]), unit=UNIT) | changes
    if options.get("summary") == "channels":
        options |= dict(table=torch.arange(D).expand(1, K, D), rank=options.get("rank", 6))
    if options.get("summary") == "between":
        options |= dict(table=torch.full((1, K, 1), 0.6))
    if options.get("summary") == "low-rank":
        options |= dict(table=torch.eye(D).expand(1, K, D, D), rank=options.get("rank", 6))
    return Read(**options)


def reading(read: Read, k: torch.Tensor, v: torch.Tensor) -> tuple[Reader, Dense]:
    reader, bulk = Reader(read, Place(0, 0, tuple(range(k.shape[1])), Board())), Dense(slow=read.slow)
    reader.append(k, v)
    bulk.append(k, v)
    return reader, bulk


@pytest.fixture
def entries() -> tuple[torch.Tensor, torch.Tensor]:
    return draw(1, K, S, D), draw(1, K, S, D, seed=1)


@pytest.mark.parametrize("heads", ["max", "mean", "sum", "each"])
@pytest.mark.parametrize("form", ["page", "cluster"])
@pytest.mark.parametrize("summary", SUMMARIES)
def test_the_needle_is_read(summary: str, form: str, heads: str) -> None:
    """A key along the query, as long as its neighbours together, stands at another place in every head."""
    if form == "cluster" and summary not in ("mean", "root-mean"):
        with pytest.raises(InputError, match="cannot stand for a cluster"):
            Reader(spec(summary=summary, form=form), Place(0, 0, (0, 1), Board()))
        return
    one = torch.tensor([1.0, -1, 1, 1, -1, 1, -1, 1])
    q = one.expand(1, K * G, 1, D) + 0.1 * draw(1, K * G, 1, D, seed=2)
    for places in ((5, 30), (0, 31), (17, 16)):
        k, v = 0.3 * draw(1, K, S, D), draw(1, K, S, D, seed=1)
        for head, place in enumerate(places):
            k[0, head, place] = 20 * one
            v[0, head, place] = 100.0
        made = spec(summary=summary, form=form, heads=heads, budget=torch.tensor([1e-3]))
        reader, bulk = reading(made, k, v)
        out, _ = reader.attend(q, bulk, STEP)
        close(out, torch.full_like(out, 100.0), torch.float16)
        assert reader.choice is not None
        assert reader.choice.shape == (1, K, G if heads == "each" else 1, 1)


@pytest.mark.parametrize("summary", SUMMARIES)
def test_scores_of_single_entries_are_their_logits(summary: str, entries) -> None:
    """A unit of one entry has the score of its key, as long as all channels are looked at."""
    (k, _), q, rule = entries, draw(1, K, G, D, seed=2), registry.module("cache/read/summaries", summary, "summary")
    table = {"channels": torch.arange(D).expand(K, D).flip(1), "low-rank": torch.linalg.qr(draw(K, D, D))[0]}
    table["between"] = torch.tensor([[0.3], [1.0]])
    given, units = Given(table.get(summary)), k[:, :, :, None]
    parts = (units,) if hasattr(rule, "share") else rule.summarise(units, given)
    close(rule.score(q, parts, given), q @ k.transpose(-1, -2))


def test_minmax_is_a_bound_and_mean_the_mean(entries) -> None:
    (k, _), q = entries, draw(1, K, G, D, seed=2)
    logits = (q @ k.transpose(-1, -2)).unflatten(3, (-1, UNIT))
    rules = {name: registry.module("cache/read/summaries", name, "summary") for name in ("minmax", "mean", "root-mean")}
    scores = {n: r.score(q, r.summarise(k.unflatten(2, (-1, UNIT)), Given()), Given()) for n, r in rules.items()}
    assert bool((scores["minmax"] >= logits.amax(-1)).all())
    close(scores["mean"], logits.mean(-1))
    close(scores["root-mean"], 2 * logits.mean(-1))


def test_constant_values_survive_the_mean_tail(entries) -> None:
    """SparF: what is not read has the mean value, so that mass is conserved."""
    k, _ = entries
    v = draw(1, K, 1, D).expand(-1, -1, S, -1)
    reader, bulk = reading(spec(summary="keys", unit=1, rank=2, tail="mean", budget=torch.tensor([3.0])), k, v)
    out, _ = reader.attend(draw(1, K * G, 1, D, seed=2), bulk, STEP)
    close(out, v[:, :, :1].repeat_interleave(G, 1))


@pytest.mark.parametrize("form", ["page", "cluster"])
def test_units_of_equal_keys_are_estimated_exactly(form: str) -> None:
    at = torch.arange(S)
    member = at // UNIT if form == "page" else (at // UNIT + 2 * (at % UNIT)) % (S // UNIT)
    k = 3 * torch.linalg.qr(draw(1, K, D, D))[0][:, :, member]
    v, q = draw(1, K, S, D, seed=1), draw(1, K * G, 1, D, seed=2)
    reader, bulk = reading(spec(summary="mean", form=form, tail="estimate"), k, v)
    expected = attend(q, k, v, scale=STEP.scale)
    for actual, wanted in zip(reader.attend(q, bulk, STEP), expected, strict=True):
        close(actual, wanted)


def test_more_is_read_the_less_is_missed(entries) -> None:
    (k, v), q = entries, draw(1, K * G, 1, D, seed=2)
    dense, missed = attend(q, k, v, scale=STEP.scale), []
    for count in (4.0, 12.0, 24.0, 32.0):
        reader, bulk = reading(spec(summary="keys", unit=1, heads="each", budget=torch.tensor([count])), k, v)
        missed.append((dense[1] - reader.attend(q, bulk, STEP)[1]).amax())
    assert all(a > b for a, b in pairwise(missed))
    same(missed[-1], torch.tensor(0.0))


@pytest.mark.parametrize(
    ("queries", "choices"),
    [([0, 0, 0, 0, 0], 1), ([0, 1, 0, 1, 0], 5), ([0, 0, 1, 1, 1], 2)],
    ids=["constant", "alternating", "one jump"],
)
def test_a_choice_is_made_where_the_query_jumps(queries: list[int], choices: int, entries) -> None:
    reader, bulk = reading(spec(period=0, jump=0.7), *entries)
    for number in queries:
        reader.attend(torch.eye(D)[number].expand(1, K * G, 1, D), bulk, STEP)
    assert reader.looks == choices * K
    assert reader.asks == len(queries) * K


def test_a_jump_above_one_is_every_step(entries) -> None:
    each, jumps = reading(spec(), *entries), reading(spec(period=0, jump=1.1), *entries)
    for seed in range(3):
        q = draw(1, K * G, 1, D, seed=seed)
        for a, b in zip(*(reader.attend(q, bulk, STEP) for reader, bulk in (each, jumps)), strict=True):
            same(a, b)


@pytest.mark.parametrize("changes", [{}, dict(period=3), dict(period=0, jump=0.5), dict(form="cluster"),
                                     dict(tail="mean")], ids=str)  # fmt: skip
def test_what_is_read_where_it_lies_is_what_a_copy_gives(changes: dict[str, Any], entries, monkeypatch) -> None:
    """As on a GPU, step after step, while rows stay at choices of other sizes and new entries join."""
    outs = []
    for here in (False, True):
        monkeypatch.setattr(Dense, "in_place", lambda self, here=here: here)
        reader, bulk = reading(spec(summary="mean", **changes), *(torch.cat([x, 2 * x]) for x in entries))
        steps = []
        for at in range(5):
            q = draw(2, K * G, 1, D, seed=at if at % 2 else 0)
            q[1] = draw(K * G, 1, D, seed=7)
            steps += reader.attend(q, bulk, STEP)
            new = draw(2, K, UNIT, D, seed=50 + at)
            reader.append(new, new)
            bulk.append(new, new)
        outs.append(torch.cat([x.flatten() for x in steps]))
    close(outs[1], outs[0])


def test_what_joined_since_the_choice_is_read_too(entries) -> None:
    reader, bulk = reading(spec(period=0), *entries)
    q = draw(1, K * G, 1, D, seed=2)
    reader.attend(q, bulk, STEP)
    first = reader.choice
    k, v = draw(1, K, 2 * UNIT, D, seed=3), draw(1, K, 2 * UNIT, D, seed=4)
    reader.append(k, v)
    bulk.append(k, v)
    reader.attend(q, bulk, STEP)
    assert first is not None
    assert reader.choice is not None
    same(reader.choice, torch.cat([torch.tensor([9, 8]).expand(1, K, 1, 2), first], 3))


BYTES = [  # what is looked at, and entries read, per KV head
    ({}, 2 * D * S // UNIT * 4, 8),
    (dict(summary="mean"), D * S // UNIT * 4, 8),
    (dict(summary="mean", budget=torch.tensor([12.0])), D * S // UNIT * 4, 12),
    (dict(summary="channels", unit=1, rank=3), 3 * S * 4, 8),
    (dict(summary="low-rank", unit=2, rank=5), 5 * S * 4, 8),
    (dict(summary="keys"), D * S * 4, 8),
    (dict(summary="keys", rank=2), G * 2 * S * 4, 8),
    (dict(outliers=2), 2 * D * S // UNIT * 4, 16),
    (dict(period=4), 2 * D * S // UNIT, 8),
    (dict(summary="mean", tail="estimate"), 2 * D * S // UNIT * 4, 8),
    (dict(tail="mean"), (2 * D * S // UNIT + D) * 4, 8),
    (dict(budget=torch.tensor([99.0])), 0, S),
    (dict(page=16, budget=torch.tensor([20.0])), 2 * D * S // UNIT * 4, 32),
]


@pytest.mark.parametrize(("changes", "looked", "read"), BYTES, ids=[str(list(c.items())) for c, *_ in BYTES])
def test_bytes_read(changes: dict[str, Any], looked: int, read: int, entries) -> None:
    reader, bulk = reading(spec(**changes), *entries)
    for seed in range(4):
        reader.attend(draw(1, K * G, 1, D, seed=seed), bulk, STEP)
    assert reader.read_bytes(bulk) == K * (looked + read * ENTRY)


def test_the_union_of_the_heads_is_read() -> None:
    k = torch.eye(D).repeat_interleave(UNIT, 0).expand(1, 1, S, D).contiguous()  # a unit for every channel
    q = torch.eye(D)[[0, 3, 3]].reshape(1, 3, 1, D)
    reader, bulk = reading(spec(heads="each", summary="mean", budget=torch.tensor([4.0])), k, draw(1, 1, S, D))
    reader.attend(q, bulk, STEP)
    assert reader.read_bytes(bulk) == D * S // UNIT * 4 + 2 * UNIT * ENTRY


@pytest.mark.parametrize(("period", "fetches"), [(1, 4), (2, 2), (0, 1)])
def test_bytes_moved(period: int, fetches: int, entries) -> None:
    """What is chosen is fetched, once as long as the choice stands; then it is held, and counted as held."""
    reader, bulk = reading(spec(slow=True, period=period), *entries)
    near, there = reading(spec(period=period), *entries)
    for seed in range(4):
        q = draw(1, K * G, 1, D, seed=seed)
        for a, b in zip(reader.attend(q, bulk, STEP), near.attend(q, there, STEP), strict=True):
            same(a, b)
    assert bulk.moved == fetches * K * 8 * ENTRY
    assert there.moved == 0
    held = sum(buffer.nbytes for buffer in reader.buffers()) - sum(buffer.nbytes for buffer in near.buffers())
    assert held == (K * 8 * ENTRY if period != 1 else 0)


def test_clusters_find_what_is_alike() -> None:
    centres = 10 * torch.linalg.qr(draw(D, D))[0]
    at = torch.arange(D * D)
    member = (at + at // D) % D  # where the centroids begin, they are all different
    k = (centres[member] + 0.1 * draw(D * D, D, seed=5)).expand(1, K, -1, D)
    labels, sizes = clustered(k, 8)
    assert sizes.tolist() == [[[8] * D] * K]
    assert bool((labels[..., :D].sort().values == torch.arange(D)).all())
    same(labels, labels[..., member])
    close(means(k, labels, sizes)[0, 0, labels[0, 0, 3]], k[0, 0, member == 3].mean(0))


def test_readings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="does not estimate a logit"):
        Reader(spec(tail="estimate"), Place(0, 0, (0, 1), Board()))
    with pytest.raises(InputError, match="outliers are pages"):
        spec(form="cluster", summary="mean", outliers=1)
    with pytest.raises(InputError, match="bad reading"):
        spec(unit=0)
    with pytest.raises(InputError, match="bad budget"):
        spec(budget=torch.tensor([0.5, 0.0]))
    for summary in ("channels", "low-rank"):
        reader = Reader(replace(spec(summary=summary), table=None), Place(0, 0, (0, 1), Board()))
        with pytest.raises(InputError, match="needs its calibrated"):
            reader.append(draw(1, K, S, D), draw(1, K, S, D))
    full = Keep(torch.zeros(1, K).int(), torch.full((1, K), -1).int(), torch.zeros(1, K).to(torch.uint8))
    with pytest.raises(InputError, match="one by one at every step"):
        spec().check(replace(full, select=Select(torch.full((1, K), 0.5), when="step")))
