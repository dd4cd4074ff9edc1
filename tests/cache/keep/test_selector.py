"""The stages of a selection one by one, and the answers that papers or arithmetic give."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool import registry
from kvtool.cache.keep.budgets._base import covering, dealt
from kvtool.cache.keep.merges._base import Job
from kvtool.cache.keep.scores._base import View
from kvtool.cache.keep.selector import Selector
from kvtool.cache.lane import Step
from kvtool.cache.segments import Dense
from kvtool.errors import InputError
from kvtool.slots import Select
from kvtool_kernels.ops import attend
from tests.methods.merging import merged as written_out
from tests.tolerance import close, same

DRAW = torch.Generator().manual_seed(0)
H, K, D = 4, 2, 8
STEP = Step(0, D**-0.5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def spec(budget: float = 0.5, **options) -> Select:
    return Select(torch.full((1, K), budget), **options)


def selector(budget: float = 0.5, **options) -> Selector:
    return Selector(spec(budget, **options), [budget] * K, 0, list(range(K)))


def score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, **options) -> torch.Tensor:
    """Scores [B,K,S] of a prompt fed at once."""
    return scored(selector(**options), q, k, k if v is None else v)


def scored(made: Selector, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scores [B,K,S] of entries that the queries q, the newest, are shown."""
    made.observe(q, 0, k, v, STEP, {})
    return made.scores(made.view(k, v, STEP, {}))


def chosen(made: Selector, scores: torch.Tensor, count: int) -> torch.Tensor:
    """What stays of entries with these scores."""
    k = torch.zeros(*scores.shape, D)
    view = View(k, torch.arange(k.shape[2]), k, k, 1.0, None, made.spec, 0, made.heads)
    return made.choose(view, scores, count, scores)


def merged(k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, index: torch.Tensor, options: Select):
    """Entries k, v and how many each stands for, after merging into those at index."""
    view = View(k, torch.arange(k.shape[2]), k, v, 1.0, None, options, 0, list(range(k.shape[1])))
    return written_out(Job(view, counts, counts, index))


def raw(q: torch.Tensor, k: torch.Tensor, **options) -> torch.Tensor:
    """What the rule alone says, [B,H,S]."""
    made = spec(**options)
    view = View(q, torch.arange(k.shape[2] - q.shape[2], k.shape[2]), k, k, STEP.scale, None, made, 0, [0, 1])
    return registry.module("cache/keep/scores", made.score, "score").score(view)


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


# score and reduce


@pytest.mark.parametrize("n", [1, 63, 100])
def test_uniform_attention_sums_to_harmonic_numbers(n: int) -> None:
    """Card H2O: column j sums to H_n − H_j, so the first tokens are heavy; all sum to the number of queries."""
    sums = raw(torch.zeros(1, H, n, D), random(1, K, n, D), observe="all", reduce="sum")
    close(sums[0, 0], torch.tensor([harmonic(n) - harmonic(j) for j in range(n)]))
    close(sums.sum(-1), torch.full((1, H), float(n)))
    made = selector(max(1, n // 4))
    same(chosen(made, score(torch.zeros(1, H, n, D), random(1, K, n, D), observe="all", reduce="sum"), max(1, n // 4)),
         torch.arange(max(1, n // 4)).expand(1, K, -1))  # fmt: skip


def test_means_over_queries_that_see_an_entry() -> None:
    """Card ZipVL: uniform attention over 8 tokens."""
    means = raw(torch.zeros(1, H, 8, D), random(1, K, 8, D), observe="all")
    expected = torch.tensor([(harmonic(8) - harmonic(j)) / (8 - j) for j in range(8)])
    close(means[0, 0], expected)
    assert [round(float(x), 3) for x in means[0, 0]] == [0.340, 0.245, 0.203, 0.177, 0.159, 0.145, 0.134, 0.125]


def test_mean_maximum_and_variance() -> None:
    q, k = random(1, H, 70, D), random(1, K, 90, D)
    p = torch.softmax((q @ k.repeat_interleave(2, 1).mT * STEP.scale).masked_fill(
        torch.ones(70, 90, dtype=torch.bool).triu(21), float("-inf")), -1)  # fmt: skip
    close(raw(q, k, reduce="max"), p.amax(2))
    whole = p[..., :20]  # what all queries see
    close(raw(q, k, variance=200.0)[..., :20], whole.mean(2) + 200 * whole.var(2))
    close(
        raw(q, k, reduce="sum", score="value-attention"),
        (p * k.abs().sum(-1).repeat_interleave(2, 1)[:, :, None]).sum(2),
    )


def test_constant_attention_has_no_variance() -> None:
    q, k = torch.ones(1, H, 5, D), random(1, K, 30, D)
    k[:, :, 25:] = -200.0  # or queries would differ by what they see
    close(raw(q, k, variance=200.0)[..., :25], raw(q, k)[..., :25])


def test_heat_makes_attention_uniform() -> None:
    q, k = random(1, H, 6, D), random(1, K, 40, D)
    close(raw(q, k, temperature=1e8, reduce="max")[..., 0], torch.full((1, H), 1 / 35))


def test_counts_of_uniform_attention_are_all() -> None:
    same(raw(torch.zeros(1, H, 5, D), random(1, K, 9, D), score="above-average"), torch.ones(1, H, 9))


def test_noise_depends_on_seed_and_head_but_not_on_the_batch() -> None:
    q, k = random(1, H, 5, D).expand(3, -1, -1, -1), random(1, K, 50, D).expand(3, -1, -1, -1)
    for rule in ("gumbel", "random"):
        first, again, other = (score(q, k, score=rule, seed=seed) for seed in (1, 1, 2))
        same(first, again)
        same(first[0], first[2])
        assert not torch.equal(first, other)
        assert not torch.equal(first[0, 0], first[0, 1])
        alone = Selector(spec(score=rule, seed=1), [0.5], 0, [1])
        close(scored(alone, q[:, 2:], k[:, 1:], k[:, 1:]), first[:, 1:])


def test_keys_unlike_the_others_score_highest() -> None:
    k = torch.ones(1, K, 20, D) + 0.01 * random(1, K, 20, D)
    k[:, :, 7] = -1
    q = random(1, H, 20, D)
    assert score(q, k, score="key-difference").argmax(-1).tolist() == [[7, 7]]
    k[:, :, 9] *= 0.01
    assert score(q, k, score="key-norm").argmax(-1).tolist() == [[9, 9]]


# pool and group


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("place", [5, 30, 60])
def test_the_neighbours_of_what_the_window_looks_at(pool: str, place: int) -> None:
    """Card SnapKV: all window queries match one entry: it and two neighbours on each side tie, and stay."""
    k = random(1, K, 63 + 4, D) * 0.01
    k[:, :, place] = 10.0
    q = torch.ones(1, H, 67, D) * 10
    made = score(q, k, observed=4, pool=pool, kernel=5, reduce="mean")
    close(made[0, 0, place - 2 : place + 3], torch.full((5,), 1.0 if pool == "max" else 0.2))
    kept = chosen(selector(9, recent=4), made, 9)
    assert kept[0, 0].tolist() == sorted({*range(place - 2, place + 3), 63, 64, 65, 66})


def test_groups_and_maximum_pooling_do_not_commute() -> None:
    k = torch.zeros(1, K, 12, D)
    k[:, :, 3, 0] = k[:, :, 4, 1] = 20.0
    q = torch.zeros(1, H, 1, D)
    q[:, 0::2, :, 0] = q[:, 1::2, :, 1] = 20.0  # the heads of a group look at neighbours
    options = {"observed": 1, "pool": "max", "kernel": 3}
    after, before = (score(q, k, group_first=first, **options)[0, 0] for first in (False, True))
    close(after[2:6], torch.tensor([0.5, 1.0, 1.0, 0.5]))
    close(before[2:6], torch.tensor([0.5, 0.5, 0.5, 0.5]))


def test_heads_that_keep_the_same() -> None:
    made = score(random(1, H, 9, D), random(1, K, 30, D), alike=True)
    same(made[:, 0], made[:, 1])
    with pytest.raises(InputError, match="same budget"):
        Select(torch.tensor([[0.5, 0.6]]), alike=True)


# budget


def test_dealing_a_layers_budget() -> None:
    """Card AdaKV: counts (4, 0) → (3, 1); and (5, 1) → (4, 1), where rounding loses one."""
    few = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.0, 0.0, 0.0]])
    assert dealt(few, [2, 2], 4, 0.5) == [3, 1]
    assert dealt(few, [5, 5], 7, 0.5) == [6, 4]  # 3 that always stay
    many = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.55], [0.5, 0.0, 0.0, 0.0, 0.0]])
    assert dealt(many, [3, 3], 5, 0.2) == [4, 1]
    assert dealt(many, [3, 3], 5, 1.0) == [3, 3]
    assert dealt(many, [3, 3], 5, 0.0) == [5, 1]
    assert dealt(torch.ones(2, 8), [4, 2], 8, 1.0) == [4, 2]
    assert dealt(many, [9, 9], 5, 0.3) == [9, 9]


def test_the_fewest_entries_of_a_mass() -> None:
    one = torch.zeros(50)
    one[20] = 1.0
    assert [covering(one, slice(0, 50), mass) for mass in (0.1, 0.5, 1.0)] == [1, 1, 1]
    flat = torch.full((50,), 0.02)
    assert [covering(flat, slice(0, 50), mass) for mass in (0.01, 0.5, 1.0)] == [1, 25, 50]
    assert covering(flat, slice(4, 40), 0.5) == 25  # 14 of them always stay
    assert covering(flat, slice(4, 40), 0.1) == 14
    assert covering(torch.zeros(9), slice(2, 9), 0.9) == 2


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_bad_selections_are_refused(budget: float) -> None:
    with pytest.raises(InputError, match="bad selection"):
        spec(budget)
    with pytest.raises(InputError, match="after every chunk"):
        spec(when="chunk", mass=0.5)


# select


def test_what_always_stays_stays_and_ties_go_to_the_newer() -> None:
    made = selector(6, sink=2, recent=3)
    same(chosen(made, torch.zeros(1, K, 20), 6)[0, 0], torch.tensor([0, 1, 16, 17, 18, 19]))
    same(chosen(made, torch.arange(20.0).flip(0).expand(1, K, -1), 6)[0, 0], torch.tensor([0, 1, 2, 17, 18, 19]))
    same(chosen(made, torch.zeros(1, K, 3), 3)[0, 0], torch.arange(3))


@pytest.mark.parametrize("place", [0, 77, 150])
def test_a_needle_survives_where_noise_drops_it(place: int) -> None:
    """An entry that the last queries look at, in a tenth of the prompt."""
    q, k = random(1, H, 200, D), random(1, K, 200, D)
    k[:, :, place] *= 6
    q[:, :, -16:] = k[:, :, place].repeat_interleave(2, 1)[:, :, None] / 4 + 0.1 * random(1, H, 16, D)

    def kept(**options) -> torch.Tensor:
        made = selector(20, recent=4, observed=16, **options)
        made.observe(q, 0, k, k, STEP, {})
        return (chosen(made, made.scores(made.view(k, k, STEP, {})), 20) == place).any(-1)

    for rule in ("attention", "value-attention", "above-average"):
        assert bool(kept(score=rule, pool="max", kernel=3).all())
    survived = sum(int(kept(score="random", seed=seed).sum()) for seed in range(50))
    assert 1 <= survived <= 25  # 8 % of a hundred on average


# merge


def twice(k: torch.Tensor) -> torch.Tensor:
    return torch.cat([k, k, k], dim=2)


@pytest.mark.parametrize("merge", ["nearest", "neighbour"])
@pytest.mark.parametrize("weigh", ["equal", "cosine", "gaussian"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_merging_copies_is_exact(tokens: int, weigh: str, merge: str) -> None:
    k, v, q = random(2, K, 5, D), random(2, K, 5, D), random(2, H, tokens, D)
    full_k, full_v = (x.repeat_interleave(3, 2) for x in (k, v))
    index = torch.arange(1, 15, 3).expand(2, K, -1)
    options = spec(merge=merge, weigh=weigh, threshold=0.5, count=True)
    held = Dense()
    held.become(*merged(full_k, full_v, torch.ones(2, K, 15), index, options), count=True)
    close(held.recall()[0], k)
    close(held.recall()[1], v)
    expected = attend(q, full_k, full_v, scale=0.3)
    for got, want in zip(held.attend(q, Step(0, 0.3)), expected, strict=True):
        close(got, want)
    own_k, own_v = random(2, K, tokens, D), random(2, K, tokens, D)
    held.append(own_k, own_v)
    held.k[:, :, held.length :] = held.v[:, :, held.length :] = held.weight[:, :, held.length :] = math.nan
    pairs = [torch.cat(pair, 2) for pair in ((full_k, own_k), (full_v, own_v))]
    got, want = held.attend(q, Step(0, 0.3), causal=True), attend(q, *pairs, scale=0.3, causal=True)
    close(got[0], want[0])
    close(got[1], want[1])
    same(held.counts()[0, 0], torch.tensor([3.0] * 5 + [1.0] * tokens))
    assert held.read_bytes() == 2 * K * (5 + tokens) * (2 * D + 1) * 4
    held.take(torch.tensor([4, 5]).expand(2, K, -1))
    same(held.counts()[1, 1], torch.tensor([3.0, 1.0]))


def test_weights_of_a_merge() -> None:
    """Two entries at the distance d: 1 and exp(−½) by card KVMerger, whose σ is d here; m of the cosine by card D2O."""
    k = torch.zeros(1, 1, 2, D)
    k[0, 0, 0, 0], k[0, 0, 1, 0], k[0, 0, 1, 1] = 1.0, 0.8, 0.6
    v = random(1, 1, 2, D)
    index, one = torch.tensor([[[0]]]), torch.ones(1, 1, 2)

    def values(weigh: str, **options) -> torch.Tensor:
        made = Select(torch.ones(1, 1), merge="nearest", weigh=weigh, **options)
        return merged(k, v, one, index, made)[1][0, 0, 0]

    close(values("equal"), v[0, 0].mean(0))
    close(values("cosine"), (v[0, 0, 0] + 0.8 * v[0, 0, 1]) / 2)
    close(values("gaussian"), (v[0, 0, 0] + math.exp(-0.5) * v[0, 0, 1]) / (1 + math.exp(-0.5)))
    same(values("equal", threshold=0.81), v[0, 0, 0])
    close(values("equal", threshold=None), v[0, 0].mean(0))  # all cosines equal: all pass


def test_only_what_is_as_near_as_the_mean_joins() -> None:
    """Card D2O: of four copies and four strangers the copies join."""
    k = torch.zeros(1, 1, 10, D)
    k[0, 0, 0, 0] = k[0, 0, 1, 1] = 1.0
    k[0, 0, 2:6, 0], k[0, 0, 6:, 5] = 1.0, 1.0
    made = Select(torch.ones(1, 1), merge="nearest", threshold=None)
    _, _, counts = merged(k, k, torch.ones(1, 1, 10), torch.tensor([[[0, 1]]]), made)
    assert counts.tolist() == [[[5.0, 1.0]]]


def test_more_entries_than_a_block_of_comparisons() -> None:
    k, v = random(1, K, 1300, D), random(1, K, 1300, D)
    index = torch.arange(3, 1300, 13).expand(1, K, -1)
    got = merged(k, v, torch.ones(1, K, 1300), index, spec(merge="neighbour", threshold=-1.0))
    close(got[2].sum(-1), torch.full((1, K), 1300.0))
    close((got[1] * got[2][..., None]).sum(2), v.sum(2))
