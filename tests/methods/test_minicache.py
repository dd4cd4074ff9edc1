"""MiniCache: which pairs are merged, and where."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.text import text
from kvtool.encoding.codecs import Affine, Raw, Slerp
from kvtool.methods._pairs import Choice, cheapest, deepest
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Store
from tests import models
from tests.analyze.traces import KV, blank
from tests.laws.methods import plan as decided
from tests.running import feed
from tests.tolerance import close, same

LAYERS = 10


def store(errors: dict[tuple[int, str], float], **options: object) -> tuple[Store, Plan]:
    """The plan for a model of 10 layers whose pairs lose 1, but for those given."""
    trace = blank("neighbours", "slerp", layers=LAYERS)
    trace["neighbours"]["tokens"] += 1
    for side in "kv":
        trace["slerp"][side][:] = 1.0
        trace["slerp"][f"{side}_energy"][:] = 1.0
    for (pair, side), lost in errors.items():
        trace["slerp"][side][pair, :, 3] = lost  # at t = 0.3
    made = calibrate("minicache", dict(options), trace=trace)
    assert made.store is not None
    return made.store, made


def test_the_published_pairs_are_the_deeper_half() -> None:
    made, plan = store({})
    assert made.spans == [[5, 6], [7, 8]]  # the last layer has no partner
    assert made.index[:, 0].tolist() == [-1] * 5 + [1, 1, 2, 2, -1]
    for number in (1, 2):
        for side in (made.keys, made.values):
            codec = side[number].codec
            assert isinstance(codec, Slerp)
            assert (codec.t, codec.kept, codec.inner) == (0.6, 4, Raw("float16"))  # 0.05 · 64, rounded up
    assert not plan.store.lossless


def test_planted_pairs_are_found_side_by_side_without_overlap() -> None:
    """(2,3) is best for both sides, though (1,2) is good for keys; (5,6) for values only."""
    planted = {(2, "k"): 0.1, (2, "v"): 0.1, (1, "k"): 0.05, (5, "v"): 0.2, (4, "k"): 0.9, (7, "k"): 0.7}
    made, plan = store(planted, mode="calibrated")
    assert plan.provenance["facts"]["pairs"] == [[2, 3, "k", "v"], [5, 6, "v"], [7, 8, "k"]]
    number = int(made.index[2, 0])
    codec = made.keys[number].codec
    assert isinstance(codec, Slerp)
    assert codec.t == pytest.approx(0.3)


def test_the_side_that_is_not_merged_is_as_in_other_layers() -> None:
    made, _ = store({(3, "k"): 0.0}, mode="calibrated", merged=0.25, bits=4, group=8)
    number = int(made.index[3, 0])
    pair = made.keys[number].codec, made.values[number].codec
    assert isinstance(pair[0], Slerp)
    assert pair[0].inner == Affine(4, 8, "token")
    assert {made.index[layer, 0].item() for layer in range(LAYERS)} >= {0}
    assert (made.keys[0].codec, made.values[0].codec) == (Affine(4, 8, "token"), Affine(4, 8, "channel"))


def brute(costs: torch.Tensor, count: int) -> float:
    """Every set of disjoint pairs, every choice of sides."""
    best = float("inf")
    pairs = range(len(costs))
    for chosen in itertools.chain.from_iterable(itertools.combinations(pairs, n) for n in range(len(costs) + 1)):
        if any(second - first < 2 for first, second in itertools.pairwise(chosen)):
            continue
        for sides in itertools.product([(0,), (1,), (0, 1)], repeat=len(chosen)):
            if sum(map(len, sides)) == count:
                best = min(best, sum(float(costs[p, s]) for p, which in zip(chosen, sides, strict=True) for s in which))
    return best


def total(costs: torch.Tensor, choice: Choice) -> float:
    return sum(float(costs[pair, side]) for pair, sides in choice.items() for side in sides)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_the_choice_is_the_best_there_is(count: int) -> None:
    for seed in range(5):
        costs = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        choice = cheapest(costs, count)
        assert sum(map(len, choice.values())) == count
        assert all(second - first >= 2 for first, second in itertools.pairwise(sorted(choice)))
        assert total(costs, choice) == pytest.approx(brute(costs, count))


def test_layers_that_cannot_be_paired_are_left_alone() -> None:
    costs = torch.tensor([[1.0, 1.0], [torch.inf, torch.inf], [torch.inf, torch.inf]])
    assert cheapest(costs, 6) == {0: (0, 1)}
    assert deepest(4, 0, torch.tensor([True, True, False])) == {0: (0, 1)}


def test_the_divergence_knows_which_layers_do_not_matter() -> None:
    """Nothing comes out of the attention of layers 0 and 1: their directions differ as others' do, and may be wrong."""
    model = models.build("llama")
    for module in model.attention_modules[:2]:
        layer: Any = module
        layer.o_proj.weight.data.zero_()
    options: dict[str, Any] = dict(samples=1, tokens=48, steps=8, recent=3, block=8, mode="calibrated", merged=0.7)
    made = decided("minicache", model, options | dict(by="divergence"))
    cost = made.evidence["divergence"]
    assert float(cost[0].abs().max()) < 1e-6
    assert float(cost[1].min()) > 1e-4
    assert made.provenance["facts"]["pairs"] == [[0, 1, "k", "v"]]
    assert float(decided("minicache", model, options).evidence["error"][0].min()) > 0.1


def test_the_divergence_is_that_of_one_merged_pair(llama: Model) -> None:
    """Text by hand: the full cache's predictions and the plan's, after a prompt of 48 tokens."""
    options: dict[str, Any] = dict(samples=1, tokens=48, steps=8, recent=3, block=8, retain=0.0)
    made = decided("minicache", llama, options | dict(mode="calibrated", by="divergence", merged=0.7))
    alone = decided("minicache", llama, options | dict(merged=0.7, t=float(made.evidence["t"][1, 0])))
    assert alone.store is not None
    sides = [replace(each, codec=Raw()) if isinstance(each.codec, Slerp) else each for each in alone.store.values]
    keys_only = replace(alone, store=replace(alone.store, values=tuple(sides)))
    ids = text(models.with_tokenizer(llama), tokens=56, samples=1, seed=0, half="calibration").samples[0].tokens[None]
    chunks = [47, *[1] * 8]
    full, thin = (feed(llama, SegmentCache(llama, plan), ids[:, :55], chunks)[0, 47:] for plan in (None, keys_only))
    p = full.double().softmax(-1)
    kl = (p * (full.double().log_softmax(-1) - thin.double().log_softmax(-1))).sum(-1).mean()
    close(made.evidence["divergence"][1, 0].double(), kl, torch.float32)
    assert float(kl) > 0


def test_what_is_measured() -> None:
    """Errors relative to the energy of both layers, over all heads; cosines from the mean over heads and tokens."""
    _, plan = store({(1, "v"): 0.25}, mode="calibrated")
    expected = torch.ones(LAYERS - 1, 2)
    expected[1, 1] = 0.25
    close(plan.evidence["error"], expected, torch.float32)
    assert plan.evidence["t"][1, 1] == pytest.approx(0.3)
    same(plan.evidence["cosine"], torch.zeros(LAYERS - 1, 2))
    assert KV == 2
