"""Rules that merge, and the picks and budgets that serve them, against definitions that go entry by entry."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvtool.cache.budgets import density, outside
from kvtool.cache.budgets._base import Ballot
from kvtool.cache.merges._base import Job
from kvtool.cache.picks._base import Choice
from kvtool.cache.runs import links, needed, runs, sole
from kvtool.cache.scores import global_local
from kvtool.cache.scores._base import View, probabilities
from kvtool.slots import Select
from tests.methods.merging import merged
from tests.tolerance import close, same

B, K, G, S, D = 2, 3, 2, 24, 8
OPEN, CLOSE = ((1, 2),), ((3,),)


def view(seed: int = 0, entries: int = S, layer: int = 0, rows: int = B, **options) -> View:
    draw = torch.Generator().manual_seed(seed)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, entries, D, generator=draw)

    q, k, v = random(K * G), random(K), random(K)
    spec = Select(torch.full((4, K), 0.5), observe="all", reduce="sum", **options)
    return View(q, torch.arange(entries), k, v, D**-0.5, None, spec, layer, list(range(K)))


def job(entries: View, kept: int, seed: int = 0, **memory) -> Job:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(entries.k.shape[:3], generator=draw)
    index = torch.rand(entries.k.shape[:3], generator=draw).argsort(-1)[..., :kept].sort(-1).values
    return Job(entries, scores, torch.ones(entries.k.shape[:3]), index, memory)


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x @ y / x.norm() / y.norm())


def heads(made: Job):
    """Row, head, keys and values [S,D], kept and dropped places."""
    for b in range(len(made.index)):
        for h in range(made.index.shape[1]):
            kept = made.index[b, h].tolist()
            yield b, h, made.view.k[b, h], made.view.v[b, h], kept, [j for j in range(S) if j not in kept]


def owners(k: torch.Tensor, kept: list[int], gone: list[int]) -> dict[int, tuple[int, float]]:
    """Dropped place → which of the kept its key resembles most, and how much."""
    found = {}
    for e in gone:
        likeness = [cosine(k[e], k[u]) for u in kept]
        best = max(range(len(kept)), key=likeness.__getitem__)
        found[e] = best, likeness[best]
    return found


# moving


@pytest.mark.parametrize("weigh", ["cosine", "equal"])
def test_a_threshold_that_moves(weigh: str) -> None:
    entries = view(1, merge="moving", weigh=weigh, settings={"alpha": 0.3, "beta": 0.7})
    made = job(entries, 9, threshold=torch.full((B, 1, 1), 0.9, dtype=torch.float64))
    k, v, counts = merged(made)
    for b in range(B):
        found = [owners(*parts[2:3], *parts[4:]) for parts in heads(made) if parts[0] == b]
        lists = [list(each.values()) for each in found]
        mean = sum(m for each in lists for _, m in each) / (K * 15)
        threshold = 0.3 * 0.9 + 0.7 * mean
        close(made.memory["threshold"][b, 0, 0], torch.tensor(threshold), torch.float32)
        joins = [sum(each[n][1] for each in lists) / K >= threshold for n in range(15)]
        assert 0 < sum(joins) < 15
        for _, h, keys, values, kept, gone in [parts for parts in heads(made) if parts[0] == b]:
            for u, place in enumerate(kept):
                mine = [e for n, e in enumerate(gone) if joins[n] and found[h][e][0] == u]
                weights = [found[h][e][1] if weigh == "cosine" else 1.0 for e in mine]
                for got, x in ((k, keys), (v, values)):
                    total = x[place] + sum(w * x[e] for w, e in zip(weights, mine, strict=True))
                    close(got[b, h, u], total / (1 + len(mine)))
                assert int(counts[b, h, u]) == 1 + len(mine)


def test_the_threshold_begins_at_the_mean_and_goes_half_way() -> None:
    entries = view(2, merge="moving", weigh="cosine")
    made = job(entries, 12)
    merged(made)
    first = made.memory["threshold"].clone()
    again = job(entries, 12, seed=1, threshold=first)
    merged(again)
    fresh = job(entries, 12, seed=1)
    merged(fresh)
    close(again.memory["threshold"], (first + fresh.memory["threshold"]) / 2)


# anchored


@pytest.mark.parametrize("shift", [0, 2])
def test_the_nearest_anchor(shift: int) -> None:
    entries = view(3, merge="anchored", sink=2, recent=1, settings={"shift": shift})
    made = job(entries, 9)
    always = torch.tensor([0, 1, S - 1])
    rest = torch.stack([torch.randperm(S - 3, generator=torch.Generator().manual_seed(n))[:6] + 2 for n in range(6)])
    index = torch.cat([always.expand(6, -1), rest], 1).sort(-1).values.reshape(B, K, -1)
    made = replace(made, index=index)
    k, v, counts = merged(made)
    for b, h, keys, values, kept, gone in heads(made):
        anchors = [u for u, place in enumerate(kept) if 2 <= place < S - 1]
        mine: dict[int, list[int]] = {u: [] for u in range(9)}
        for e in gone:
            mine[min(anchors, key=lambda u, e=e: (abs(kept[u] - (e - shift)), kept[u]))].append(e - shift)
        for u, place in enumerate(kept):
            for got, x in ((k, keys), (v, values)):
                close(got[b, h, u], (x[place] + sum(x[e] for e in mine[u])) / (1 + len(mine[u])))
            assert int(counts[b, h, u]) == 1 + len(mine[u])
            assert place not in (0, 1, S - 1) or not mine[u]


def test_without_an_anchor_nothing_is_averaged() -> None:
    entries = view(3, merge="anchored", sink=2, recent=1)
    made = replace(job(entries, 3), index=torch.tensor([0, 1, S - 1]).expand(B, K, -1))
    same(merged(made)[0], entries.k[:, :, [0, 1, S - 1]])


def test_after_the_prompt_nothing_is_averaged() -> None:
    entries = replace(view(3, merge="anchored"), turn=1)
    made = job(entries, 20)
    same(merged(made)[1], entries.v.gather(2, made.index[..., None].expand(-1, -1, -1, D)))


# halfway


def test_half_of_what_joins_is_the_kept_entry() -> None:
    made = job(view(4, merge="halfway"), 7)
    k, v, _ = merged(made)
    for b, h, keys, values, kept, gone in heads(made):
        found = owners(keys, kept, gone)
        for u, place in enumerate(kept):
            mine = [e for e in gone if found[e][0] == u]
            for got, x in ((k, keys), (v, values)):
                close(got[b, h, u], (x[place] + sum((x[e] + x[place]) / 2 for e in mine)) / (1 + len(mine)))


# centres


def test_centres_candidates_and_the_zero_class() -> None:
    made = job(view(5, merge="centres", threshold=0.3, settings={"candidates": 0.75}), 8)
    k, v, counts = merged(made)
    zero, late = 0, 0
    for b, h, keys, values, kept, gone in heads(made):
        s = made.scores[b, h].tolist()
        order = sorted(gone, key=lambda e: -s[e])[:6]
        found = owners(keys, kept, gone)
        zero += sum(found[e][1] < 0.3 for e in order)
        late += sum(found[e][1] >= 0.3 for e in gone if e not in order)
        for u, place in enumerate(kept):
            mine = [e for e in order if found[e][0] == u and found[e][1] >= 0.3]
            total = s[place] + sum(s[e] for e in mine)
            key, value = ((s[place] * x[place] + sum(s[e] * x[e] for e in mine)) / total for x in (keys, values))
            close(v[b, h, u], value)
            close(k[b, h, u], key / key.norm() * keys[place].norm())
            assert int(counts[b, h, u]) == 1 + len(mine)
    assert zero  # or nothing was thrown away
    assert late  # or there were not too many candidates


def test_above_one_nothing_joins_and_kept_entries_are_as_they_were() -> None:
    made = job(view(5, merge="centres", threshold=1.5, settings={"candidates": 9.0}), 8)
    k, v, counts = merged(made)
    index = made.index[..., None].expand(-1, -1, -1, D)
    close(k, made.view.k.gather(2, index))
    close(v, made.view.v.gather(2, index))
    assert bool((counts == 1).all())


# runs


def walk(k: torch.Tensor, alone: list[bool], epsilon: float) -> list[list[int]]:
    """The runs of one head, scanned from its last entry to its first."""
    found = [[S - 1]]
    for i in range(S - 2, -1, -1):
        if cosine(k[i], k[i + 1]) > epsilon and not (alone[i] or alone[i + 1]):
            found[-1].append(i)
        else:
            found.append([i])
    return [sorted(run) for run in reversed(found)]


def smooth(seed: int, **options) -> View:
    """Keys of neighbours resemble one another, more or less."""
    made = view(seed, **options)
    return replace(made, k=made.k + 1.5 * made.k.roll(1, 2))


@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 0.4, 0.7, 1.0])
def test_runs_scanned_from_the_last(epsilon: float) -> None:
    entries = smooth(6)
    alone = torch.rand(B, K, S, generator=torch.Generator().manual_seed(0)) < 0.2
    got = runs(links(entries.k, alone), S, torch.full((K,), epsilon))
    for b in range(B):
        for h in range(K):
            expected = walk(entries.k[b, h], alone[b, h].tolist(), epsilon)
            assert got[b, h].tolist() == [n for n, run in enumerate(expected) for _ in run]
            if epsilon == 1.0:
                assert len(expected) == S  # a link must be stronger than ε


def test_the_threshold_that_meets_a_budget() -> None:
    linked = links(smooth(7).k, torch.zeros(B, K, S, dtype=torch.bool))
    for count in (1, 5, 13, 23):
        run = runs(linked, count)
        assert (run[..., -1] + 1 == count).all()
        below = needed(linked, count) - 1e-5
        for b in range(B):
            assert (runs(linked[b : b + 1], S, below[b])[..., -1] + 1 == count).all()
            close(runs(linked[b : b + 1], S, below[b]), run[b : b + 1], torch.float64)
    assert runs(linked, S)[0, 0].tolist() == list(range(S))
    assert needed(linked, S).unique().tolist() == [1.0]


@pytest.mark.parametrize("count", range(1, S + 1))
@pytest.mark.parametrize("heavy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("free", [slice(0, S), slice(2, S - 4), slice(4, 5)])
def test_any_budget_can_be_met(count: int, heavy: float, free: slice) -> None:
    """However many entries would stand alone."""
    entries = smooth(8)
    scores = torch.rand(B, K, S, generator=torch.Generator().manual_seed(count))
    alone = sole(scores, count, free, heavy)
    run = runs(links(entries.k, alone), count)
    assert (run[..., -1] + 1 == count).all()
    assert bool(alone[..., S - 1 :].any()) == (free.stop < S and count > 1 + min(free.start, count - 1)) or heavy


@pytest.mark.parametrize("count", [8, 12])
def test_runs_become_their_pivots(count: int) -> None:
    entries = smooth(9, merge="runs", weigh="gaussian", pick="runs", sink=1, settings={"heavy": 0.25})
    made = job(entries, count)
    choice = Choice(entries, made.scores, count, slice(1, S - 2), made.scores)
    index = entries.spec.rule("pick").pick(choice)
    k, v, counts = merged(replace(made, index=index, memory=choice.memory))
    assert not choice.memory  # nothing is held on
    for b in range(B):
        for h in range(K):
            s, keys = made.scores[b, h].tolist(), entries.k[b, h]
            best = sorted(range(1, S - 2), key=lambda e, s=s: -s[e])[: round(0.25 * count)]
            alone = [e < 1 or e >= S - 2 or e in best for e in range(S)]
            pairs = [i for i in range(S - 1) if not alone[i] and not alone[i + 1]]
            strength = [-2.0, *sorted(cosine(keys[i], keys[i + 1]) for i in pairs)]
            found = walk(keys, alone, strength[-(S - count) - 1])
            assert len(found) == count
            for n, run in enumerate(found):
                p = max(run, key=s.__getitem__)
                assert int(index[b, h, n]) == p
                apart = [float((keys[e] - keys[p]).norm()) for e in run if e != p]
                sigma = sum(apart) / max(1, len(apart))
                g = [math.exp(-(float((keys[e] - keys[p]).norm()) ** 2) / 2 / sigma**2) if sigma else 1.0 for e in run]
                for got, x in ((k, keys), (v, entries.v[b, h])):
                    close(got[b, h, n], sum(w * x[e] for w, e in zip(g, run, strict=True)) / sum(g))
                assert int(counts[b, h, n]) == len(run)


def test_a_known_threshold_may_keep_fewer_but_never_more() -> None:
    """One row and one head at a time, as a ragged rule is asked."""
    for epsilon, fewer in ((0.3, True), (0.99, False)):
        table = {"epsilon": torch.full((4, K), epsilon)}
        entries = smooth(10, rows=1, pick="similar-runs", settings={"heavy": 0.1}, tables=table)
        entries = replace(entries, q=entries.q[:, :G], k=entries.k[:, :1], v=entries.v[:, :1], heads=[1])
        scores = torch.rand(1, 1, S, generator=torch.Generator().manual_seed(0))
        index = entries.spec.rule("pick").pick(Choice(entries, scores, 16, slice(0, S), scores))
        assert (index.shape[2] < 16) == fewer
        assert index.shape[2] <= 16


# picks


def test_a_share_of_the_places_is_for_the_newest() -> None:
    entries = view(11, pick="split", sink=2, settings={"newest": 0.25})
    scores = torch.arange(S, 0, -1.0).expand(B, K, -1)
    index = entries.spec.rule("pick").pick(Choice(entries, scores, 12, slice(2, S), scores))
    same(index[0, 0], torch.tensor([*range(9), 21, 22, 23]))


def test_the_order_of_scores_is_not_their_ranks() -> None:
    """Card Elastic Cache: entry i stays if the entry with the i-th smallest score has a number above f."""
    entries = view(12, pick="permuted", sink=2, recent=1, settings={"distance": 3})
    scores = torch.tensor([9.0, 9.0, 3.0, 1.0, 5.0, 4.0, 2.0, 6.0, 9.0]).expand(1, 1, -1)
    index = entries.spec.rule("pick").pick(Choice(entries, scores, 6, slice(2, 8), scores))
    # the six in between, by score: entries 1, 4, 0, 3, 2, 5; three are to leave, and those at 1 and 5 are above 3
    same(index[0, 0], torch.tensor([0, 1, 3, 7, 8]))
    rising = torch.arange(9.0).expand(1, 1, -1)
    index = entries.spec.rule("pick").pick(Choice(entries, rising, 6, slice(2, 8), rising))
    same(index[0, 0], torch.tensor([0, 1, 6, 7, 8]))  # where order and ranks are one, only one is missing


# scores and budgets


def test_global_and_local_importance() -> None:
    entries = view(13, settings={"window": 5})
    got = global_local.score(entries)
    p = torch.cat([block for _, block in probabilities(entries)], 2)
    for b in range(B):
        for h in range(K * G):
            everywhere = [float(p[b, h, j:, j].mean()) for j in range(S)]
            lately = [float(p[b, h, -5:, j].sum()) for j in range(S)]
            means = [sum(x[: S - 4]) / (S - 4) for x in (everywhere, lately)]
            expected = [g / means[0] + late / means[1] for g, late in zip(everywhere, lately, strict=True)]
            close(got[b, h], torch.tensor(expected))


def test_densities() -> None:
    """Card D2O: min–max over heads; equal heads are 0, not 0/0."""
    close(density.density(torch.tensor([1.0, 3.0, 2.0])), torch.tensor(0.5))
    close(density.density(torch.tensor([1.0, 1.0, 1.0, 5.0])), torch.tensor(0.25))
    assert float(density.density(torch.full((4,), 2.0))) == 0.0


def ballots(*densities: list[float], limit: int = 6) -> list[Ballot]:
    """Layers whose heads' payments have these variances."""
    found = []
    for layer, variances in enumerate(densities):
        entries = view(14, layer=layer, rows=1)
        line = torch.linspace(-1, 1, S)
        line = line / line.std()
        entries.__dict__["paid"] = torch.tensor(variances).sqrt()[None, :, None] * line
        found.append(Ballot(entries, torch.zeros(1, K, S), [limit] * K, slice(0, S)))
    return found


def test_even_layers_keep_more() -> None:
    """Card D2O: weights softmax(−F) times the number of layers; a peaked head beside flat ones gives a low F."""
    made = ballots([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 9], [0, 9, 9, 9, 9, 9])
    assert density.deal(made)[0] == [round(6 * 3 * weight) for weight in [0.4418] * 3]
    weights = [math.exp(-f) for f in (0, 1 / 6, 5 / 6)]
    assert density.deal(made) == [[round(6 * 3 * w / sum(weights))] * K for w in weights]


def test_layers_that_stay_whole_and_the_least_that_a_layer_keeps() -> None:
    made = ballots([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1])
    made[0] = replace(made[0], limits=[2**30] * K)
    assert density.deal(made) == [[2**30] * K, [6] * K]
    assert density.deal(ballots([1, 2, 1, 1, 1, 1], limit=0)) == [[1] * K]
    assert density.deal([replace(x, limits=[20] * K) for x in ballots([1] * 6, [0, 9, 9, 9, 9, 9])])[0] == [S] * K


def test_what_lies_outside_of_spans_sets_the_limit() -> None:
    entries = view(15, rows=1, score="outside", settings={"open": OPEN, "close": CLOSE})
    tokens = torch.full((S,), 9)
    scores = torch.zeros(1, K, S)

    def limits(row: torch.Tensor, limit: int) -> list[int]:
        seen = replace(entries, tags={"tokens": row.expand(1, K, -1)})
        return outside.deal([Ballot(seen, scores, [limit] * K, slice(0, S - 4))])[0]

    assert limits(tokens, 8) == [S] * K  # no span, nothing leaves
    tokens[3], tokens[4], tokens[14] = 1, 2, 3
    assert limits(tokens, 8) == [S - 9] * K  # nine entries between the markers
    assert limits(tokens, 21) == [21] * K
    tokens[14] = 9  # never closed
    assert limits(tokens, 8) == [9] * K


def test_outside_comes_first_and_attention_decides_within() -> None:
    entries = view(16, score="outside", settings={"open": OPEN, "close": CLOSE})
    tokens = torch.full((B, S), 9)
    tokens[0, 2:4] = torch.tensor([1, 2])
    tokens[1, 5], tokens[1, 6], tokens[1, 20] = 1, 2, 3
    seen = replace(entries, tags={"tokens": tokens[:, None].expand(-1, K, -1)})
    scores = entries.spec.rule("score").score(seen)
    spans = torch.zeros(B, 1, S, dtype=torch.bool)
    spans[0, :, 4:], spans[1, :, 7:20] = True, True
    spans = spans.expand(-1, K * G, -1)
    assert float(scores[~spans].min()) > float(scores[spans].max())
    for row in range(B):
        for mask in (spans[row, 0], ~spans[row, 0]):
            same(scores[row][:, mask].argsort(-1), seen.paid[row][:, mask].argsort(-1))
