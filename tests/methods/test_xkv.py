"""xKV: known answers of its card."""

from __future__ import annotations

import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.encoding.transforms import Linear
from kvtool.errors import InputError
from kvtool.methods.xkv import basis, spans
from kvtool.model import Geometry
from kvtool.plan import Plan
from tests import models
from tests.analyze.traces import CHANNELS, KV, WIDTH, blank
from tests.laws.methods import trace
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close


def content(rank: int, seed: int, tokens: int = 300) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, rank, generator=draw, dtype=torch.float64)
    return z @ torch.randn(rank, CHANNELS, generator=draw, dtype=torch.float64)


def planned(*layers: torch.Tensor, **options: object) -> Plan:
    """The plan for layers with these keys and values, [T,C] each."""
    made = blank("gram", "cross-gram", layers=len(layers))
    for side in ("k_pre", "v"):
        for at, x in enumerate(layers):
            made["gram"][side][at] = x.T @ x
            for distance, y in enumerate(layers[at + 1 : at + 4], 1):
                made["cross-gram"][side][distance - 1, at] = x.T @ y
    for name in ("gram", "cross-gram"):
        made[name]["tokens"] += len(layers[0])
    return calibrate("xkv", dict(options), trace=made)


def rebuilt(plan: Plan, side: str, span: int, *layers: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's entries [T,C] as the plan gives them back."""
    assert plan.store is not None
    encoding = getattr(plan.store, side)[span]
    heads = [x.float().unflatten(1, (KV, WIDTH)).transpose(0, 1) for x in layers]
    back = encoding.decode(encoding.encode(torch.cat(heads)[None]), WIDTH)[0]
    return [part.transpose(0, 1).flatten(1) for part in back.chunk(len(layers))]


def test_a_layer_that_is_another_in_other_words_costs_nothing() -> None:
    """Card B21: layer 2 = layer 1 · M has the rank of layer 1, and is exact at that rank; apart, half of it is lost."""
    one = content(CHANNELS // 2, seed=1)
    turn = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(2)).double())[0]
    two = 50 * one @ turn
    shared = planned(one, two, layers=2, rank_k=0.25, rank_v=0.25)
    for side in ("keys", "values"):
        for got, x in zip(rebuilt(shared, side, 0, one, two), (one, two), strict=True):
            close(got / 50, x.float() / 50, torch.float32)
    close(shared.evidence["kept"], torch.ones(2, 2))
    apart = planned(one, two, layers=1, rank_k=0.25, rank_v=0.25)
    assert float(apart.evidence["kept"].max()) < 0.9


def test_the_error_is_the_energy_that_is_dropped() -> None:
    layers = [content(CHANNELS, seed) for seed in range(3)]
    plan = planned(*layers, layers=3, rank_k=0.4, rank_v=0.6, normalise=False)
    values = torch.linalg.svdvals(torch.cat(layers, dim=1)).square()
    for side, share in (("keys", 0.4), ("values", 0.6)):
        count = round(share * 3 * CHANNELS)
        lost = sum((got - x).square().sum() for got, x in zip(rebuilt(plan, side, 0, *layers), layers, strict=True))
        close(lost / values.sum(), values[count:].sum() / values.sum(), torch.float32)


def test_one_layer_is_its_own_svd_and_full_rank_is_exact() -> None:
    x = content(CHANNELS, seed=3)
    plan = planned(x, layers=4, rank_k=0.5, rank_v=1.0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[: CHANNELS // 2]
    close(rebuilt(plan, "keys", 0, x)[0] / 10, (x @ directions.T @ directions).float() / 10, torch.float32)
    close(rebuilt(plan, "values", 0, x)[0] / 10, x.float() / 10, torch.float32)


def test_a_loud_layer_takes_the_whole_rank_unless_scaled() -> None:
    one, two = content(CHANNELS, seed=4), 1000 * content(CHANNELS, seed=5)
    quiet = []
    for normalise in (True, False):
        plan = planned(one, two, layers=2, rank_k=0.5, rank_v=0.5, normalise=normalise)
        got = rebuilt(plan, "values", 0, one, two)[0]
        quiet.append(float((got - one).norm() / one.norm()))
    assert quiet[0] < 0.7
    assert quiet[1] > 0.8


def test_groups_are_runs_of_layers_without_windows() -> None:
    def geometry(*windows: int | None) -> Geometry:
        return Geometry("", len(windows), 2, 2, 8, 16, 10, windows, "")

    assert spans(geometry(*[None] * 10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert spans(geometry(7, None, None, 7, None, None, None), 2) == [[1, 2], [4, 5], [6]]


def test_keys_are_stored_before_rope_and_windowed_layers_not_at_all() -> None:
    plan = calibrate("xkv", {}, trace=trace(models.shared("gemma3"), ("gram", "cross-gram")))
    assert plan.store is not None
    assert [encoding.rotated for encoding in (plan.store.keys[0], plan.store.values[0])] == [False, True]
    assert (plan.store.index[:, 0] >= 0).tolist() == [False, True, False, True]
    assert plan.store.spans == []


def test_each_prompt_makes_its_own_basis() -> None:
    """Of what leaves the raw window at the prompt's end; its tensors are held, and counted, once for the group."""
    model = models.double("llama")
    g = model.geometry
    width = 3 * g.kv_heads * g.head_dim
    options = dict(mode="prompt", layers=3, rank_k=0.5, rank_v=0.25, normalise=False, recent=2, block=8, sink=0)
    plan = calibrate("xkv", options, model=model)
    cache, full = SegmentCache(model, plan), SegmentCache(model)
    ids = random_ids(2, 42, seed=3)
    for each in (cache, full):
        feed(model, each, ids, [42])
        each.finish()
    for row in range(2):
        lanes = [next(iter(layer.parts[row].lanes)) for layer in cache.segments]
        exact = [next(layer.lanes()).recall()[1][row, :, :40] for layer in full.segments]
        held = [lane.recall()[1][0, :, :40] for lane in lanes]
        values = torch.linalg.svdvals(torch.cat(exact).transpose(0, 1).flatten(1)).square()
        lost = (torch.cat(held) - torch.cat(exact)).square().sum()
        close(lost / values.sum(), values[width // 4 :].sum() / values.sum(), torch.float32)
        count = width // 2 + width // 4
        coded = [sum(buffer.nbytes for buffer in lane.bulk.buffers()) for lane in lanes]
        assert coded == [40 * count * 8 + 2 * width * count * 4, 0, 0]


def test_the_basis_is_orthonormal_and_ordered() -> None:
    x = content(CHANNELS, seed=6)
    step, kept = basis(x.T @ x, 1, 0.5, False)
    assert isinstance(step, Linear)
    close(step.up[0] @ step.down[0], torch.eye(CHANNELS // 2), torch.float32)
    energy = (x.float() @ step.down[0]).square().sum(0)
    assert energy.tolist() == sorted(energy.tolist(), reverse=True)
    close(torch.tensor(kept), (energy.sum() / x.square().sum()).float())


def test_traces_of_different_texts_are_refused() -> None:
    made = blank("gram", "cross-gram")
    made["gram"]["tokens"] += 5
    with pytest.raises(InputError, match="different texts"):
        calibrate("xkv", {}, trace=made)
    with pytest.raises(InputError, match="1 to 4"):
        calibrate("xkv", {"layers": 5}, trace=made)
