"""Rules that merge, against definitions that go entry by entry."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvtool.cache.keep.merges._base import Job
from kvtool.cache.keep.picks._base import Choice
from kvtool.cache.keep.runs import links, needed, runs, sole
from kvtool.cache.keep.scores._base import View
from tests.cache.keep.merging import B, D, G, K, S, job, view
from tests.methods.merging import merged
from tests.tolerance import close, same


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
    choice = Choice(made.view, made.scores, count, slice(1, S - 2), made.scores)
    index = entries.spec.rule("pick").pick(choice)
    assert made.memory
    k, v, counts = merged(replace(made, index=index))
    assert not made.memory  # nothing is held on
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
