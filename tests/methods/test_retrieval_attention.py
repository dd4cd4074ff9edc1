"""Known answers of RetrievalAttention, card C3; the laws hold its indices to their definitions, key by key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.indexes import graph
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.slots import Read
from kvtool.trace import Trace
from tests import models
from tests.laws.methods import observed
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error, same

IDS, CHUNKS = random_ids(1, 70, seed=6), [60, *[1] * 10]
SMALL = dict(budget=6, nearest=6, degree=4, ef=8, sink=1, recent=2, evidence=False)


def run(model: Model, chunks: list[int] = CHUNKS, **settings: Any) -> tuple[torch.Tensor, SegmentCache]:
    cache = SegmentCache(model, calibrate("retrieval-attention", SMALL | settings, model=model))
    return feed(model, cache, IDS, chunks), cache


def reader(cache: SegmentCache) -> Any:
    (lane,) = cache.segments[0].lanes()
    return lane.reader


def shifted(keys: int = 2000, queries: int = 2000, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, and queries elsewhere and spread along other directions."""
    draw = torch.Generator().manual_seed(1)
    mean, spread = torch.randn(width, generator=draw), torch.linspace(2, 0.2, width)
    k = torch.randn(keys, width, generator=draw) * spread + 0.5 * mean
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    return k, (torch.randn(queries, width, generator=draw) * spread.flip(0)) @ turn.T - 1.5 * mean


def searched(neighbours: torch.Tensor, k: torch.Tensor, q: torch.Tensor, entry: int, ef: int) -> tuple[float, float]:
    """Recall of the best ten keys, and the share of keys that were scanned, by queries that are heads of one key."""
    search = dict(queries=1, nearest=1, degree=1, ef=ef, wide=1)
    found = graph.Found(Read(torch.ones(1), unit=1, index="graph", search=search), None)  # type: ignore[arg-type]
    found.neighbours = neighbours.expand(1, 1, len(q), *neighbours.shape)
    found.entry = torch.full((1, 1, len(q)), entry)
    scores = found.walk(q[None, None], k[None, None], 10)[0, 0]
    best = (q @ k.T).topk(10).indices
    return float((scores.gather(1, best) > float("-inf")).float().mean()), float(
        (scores > float("-inf")).float().mean()
    )


def test_shared_queries_lead_where_keys_do_not() -> None:
    """The planted case: at the same recall, and from the same entry, the projected graph scans half of what a graph of
    nearest keys does, its links in both directions; and queries are far from keys."""
    k, drawn = shifted()
    q, new = drawn[:-50], drawn[-50:]
    entry = int((k @ q.mean(0)).argmax())
    projected = graph.graph(q, k, nearest=16, degree=32)
    nearest = (k @ k.T).fill_diagonal_(float("-inf")).topk(16).indices
    linked = torch.zeros(len(k), len(k), dtype=torch.bool).scatter_(1, nearest, True)
    linked |= linked.T.clone()
    width = int(linked.sum(1).max())
    order = linked.int().argsort(dim=1, descending=True, stable=True)[:, :width].int()
    of_keys = order.masked_fill(torch.arange(width) >= linked.sum(1, keepdim=True), -1)
    recall, scanned = searched(projected, k, new, entry, ef=60)
    for ef in (20, 30, 40, 60, 80):
        other, cost = searched(of_keys, k, new, entry, ef)
        if other >= recall:
            break
    assert recall > 0.9
    assert other >= recall
    assert scanned < 0.6 * cost


def test_two_keys_that_a_query_shares_are_neighbours() -> None:
    """Three queries: keys 1 and 4 together twice, 1 and 2 once; the heavier link comes first, and degree cuts."""
    k = torch.eye(6)
    q = torch.stack([k[1] + k[4], k[1] + 2 * k[4], k[1] + k[2]])
    same(graph.graph(q, k, nearest=2, degree=2)[[0, 1, 2, 4]], torch.tensor([[-1, -1], [4, 2], [1, -1], [1, -1]]).int())
    same(graph.graph(q, k, nearest=2, degree=1)[1], torch.tensor([4]).int())


def test_a_flat_index_finds_the_best() -> None:
    """Recall 1 by definition: every query head reads its largest products."""
    model = models.double("llama")
    _, cache = run(model, index="flat")
    (lane,) = cache.segments[0].lanes()
    q = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(2)).double()
    lane.reader.attend(q, lane.bulk, Step(0, 8**-0.5))
    logits = q[:, :, 0].unflatten(1, (2, 2)) @ lane.bulk.keys().mT
    same(lane.reader.choice, logits.topk(6).indices.sort(-1, descending=True).values)


@pytest.mark.parametrize("settings", [dict(ef=900), dict(index="cluster", scan=1.0)], ids=str)
def test_an_index_that_looks_at_everything_is_flat(settings: dict[str, Any]) -> None:
    model = models.double("llama")
    flat = run(model, index="flat")[0]
    close(run(model, **settings)[0], flat, torch.float32)
    assert error(flat, own(model, IDS)) > 1e-2


@pytest.mark.parametrize("index", ["graph", "cluster", "flat"])
def test_what_is_scanned_is_read(index: str) -> None:
    """Bytes of a step: the window, the union of what was chosen, every key scanned, for each query head, and the
    index; and only what was chosen has moved."""
    model = models.shared("llama")
    _, cache = run(model, index=index)
    (lane,) = cache.segments[0].lanes()
    key, group = 4 * model.geometry.head_dim, model.geometry.group
    chosen = sum(len(set(head.flatten().tolist())) for head in lane.reader.choice[0])
    window = (lane.sinks.length + lane.recent.length) * 2 * 2 * key
    found = lane.reader.index
    if index == "flat":
        looked = 2 * lane.bulk.length * key  # once for all query heads of a KV head
    else:
        late = lane.bulk.length - found.made
        own = sum(x.nbytes for x in found.buffers()) if index == "cluster" else 4 * 4 * found.expanded
        looked = round(2 * key * (group * found.scanned + late)) + own
        assert 0 < found.scanned < found.made
    assert lane.read_bytes() == window + chosen * 2 * key + looked
    if index != "flat":
        assert lane.moved_bytes() == 10 * 2 * group * 6 * 2 * key  # ten steps, two KV heads, six entries a query head


def test_the_sample_does_not_depend_on_the_cut() -> None:
    model = models.double("llama")
    whole, parts = (reader(run(model, chunks, queries=16)[1]).index for chunks in (CHUNKS, [7, 20, 31, 2, *[1] * 10]))
    assert whole.sample.shape[3] == 15  # every fourth of sixty
    close(parts.sample, whole.sample)
    same(parts.neighbours, whole.neighbours)


def test_what_joins_later_is_scanned_and_at_last_linked() -> None:
    model = models.shared("llama")
    ids = random_ids(1, 60, seed=6)
    cache = SegmentCache(model, calibrate("retrieval-attention", SMALL, model=model))
    made = []
    for size in [20, *[1] * 40]:
        feed(model, cache, ids[:, :size], [size])
        made.append(reader(cache).index.made)
    assert sorted(set(made)) == [0, 17, 34]


def test_queries_lie_outside_by_their_distance() -> None:
    """Evidence against the plain definition."""
    model = models.shared("llama")
    seen = observed(model, ("moments",))
    made = calibrate("retrieval-attention", {}, trace=seen)
    moments, tokens = seen["moments"], float(seen["moments"]["tokens"])
    mean = moments["k_sum"][1, 0] / tokens
    covariance = moments["k_square"][1, 0] / tokens - torch.outer(mean, mean)
    draw = torch.Generator().manual_seed(3)
    q_mean = moments["q_sum"][1, 1] / tokens  # a sample with the moments of the queries stands for them
    spread = torch.linalg.cholesky(moments["q_square"][1, 1] / tokens - torch.outer(q_mean, q_mean))
    noise = torch.randn(4000, 8, generator=draw).double()
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T, correction=0))).T
    q = q_mean + noise @ spread.T - mean
    expected = ((q @ torch.linalg.inv(covariance)) * q).sum(1).mean().sqrt()
    close(made.evidence["outside"][1, 1], (expected / 8**0.5).float(), torch.float16)


def test_keys_lie_where_keys_lie() -> None:
    """With their own moments in place of the queries', all heads' distance is one; shifted queries are further off."""
    model = models.shared("llama")
    seen = Trace(model.fingerprint, model.name, {"moments": copy.deepcopy(observed(model, ("moments",))["moments"])})
    moments = seen["moments"]
    for name in ("sum", "square"):
        moments[f"q_{name}"] = moments[f"k_{name}"].repeat_interleave(model.geometry.group, 1)
    close(calibrate("retrieval-attention", {}, trace=seen).evidence["outside"], torch.ones(3, 6), torch.float16)
    square, tokens = moments["q_square"], float(moments["tokens"])
    shift = 5.0 * torch.ones(8)
    cross = moments["q_sum"][..., None] * shift
    moments["q_square"] = square + cross + cross.mT + tokens * torch.outer(shift, shift)
    moments["q_sum"] = moments["q_sum"] + tokens * shift
    assert bool((calibrate("retrieval-attention", {}, trace=seen).evidence["outside"] > 2).all())


def test_the_needle_is_read(induction: Model) -> None:
    """One entry a query head, found by a walk of four keys at a time: the copied one."""
    ids = repeated(40, 2)[None]
    options = dict(SMALL, budget=1, ef=4, sink=0, recent=1)
    logits = feed(induction, SegmentCache(induction, calibrate("retrieval-attention", options, model=induction)), ids,
                  [44, *[1] * 36])  # fmt: skip
    assert float((logits[0, 44:-1].argmax(-1) == ids[0, 45:]).float().mean()) > 0.9


@pytest.mark.parametrize("settings", [dict(budget=0), dict(nearest=1), dict(scan=1.5), dict(index="a"), dict(wide=0)])
def test_bad_options_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        run(models.shared("llama"), **settings)


def test_readings_that_an_index_cannot_serve_are_refused() -> None:
    search = dict(entries=4, scan=0.5)
    for changes in (dict(unit=4), dict(unit=1, heads="mean"), dict(unit=1, tail="mean"), dict(unit=1, search={})):
        with pytest.raises(InputError):
            Read(torch.ones(1), **(dict(index="cluster", search=search, summary="keys") | changes))
