"""Known answers of DHSA, card C9; what blocks of queries read, entry by entry, is in tests/cache/read/prefilling.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

from kvtool import registry
from kvtool.cache.lane import Step
from kvtool.cache.read.board import Board
from kvtool.cache.read.boundaries import _base as boundaries
from kvtool.cache.read.boundaries import predicted
from kvtool.cache.read.prefills._base import Job
from kvtool.cache.read.prefills.units import Rule
from kvtool.cache.read.sparse import Sparse
from kvtool.cache.read.summaries._base import Given
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.methods import _boundaries
from kvtool.methods.dhsa import Options
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.rotary import NONE
from kvtool.slots import Prefill
from tests import models
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error, same

SMALL: dict[str, object] = dict(
    budget=12,
    block=8,
    unit=3,
    sink=0,
    local=4,
    dense=4,
    window=2,
    apart=2,
    samples=4,
    tokens=60,
    steps=40,
    width=6,
    hidden=8,
)


def dhsa(model: Model, **settings: object) -> Plan:
    return calibrate("dhsa", SMALL | settings, model=models.with_tokenizer(model))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_root_keeps_the_spread_of_scores() -> None:
    """Card C9: for independent keys the variance does not depend on the chunk's length; that of plain means falls."""
    q, width, chunks = draw(16), 16, 4000
    found: dict[str, list[float]] = {"root-mean": [], "mean": []}
    for size in (1, 4, 16, 64):
        mean = draw(chunks, width, seed=size) / size**0.5  # of `size` independent keys
        for name, variances in found.items():
            rule = registry.module("cache/read/summaries", name, "summary")
            parts = rule.pooled(mean[None, None], torch.full((1, 1, chunks), size))
            variances.append(float(rule.score(q[None, None, None], parts, Given()).var()))
    assert max(found["root-mean"]) < 1.15 * min(found["root-mean"])
    assert found["mean"][0] > 50 * found["mean"][3]


def picked(begins: list[int], count: int) -> list[int]:
    """What queries 40 … 47 read of entries 0 … 35; they look at entries 20 … 25, and a little at 26 … 30."""
    q, k = torch.zeros(1, 2, 8, 4, dtype=torch.float64), torch.zeros(1, 1, 48, 4, dtype=torch.float64)
    q[..., 0], k[:, :, 20:26, 0], k[:, :, 26:31, 0] = 1.0, 1.0, 0.3
    spec = Prefill(torch.ones(1), summary="root-mean")
    job = Job(spec, q, k, Step(40, 1.0), NONE, 0, lambda low, first, near: torch.tensor([begins]))
    return Rule(job).pick(40, 48, 0, 36, count)[0, 0].tolist()


def test_a_planted_chunk_is_read() -> None:
    assert picked([0, 7, 20, 26, 31], 6) == [20, 21, 22, 23, 24, 25]
    assert picked([0, 7, 20, 26, 31], 9) == [20, 21, 22, 23, 24, 25, 28, 29, 30]  # of the last one its newest
    assert picked([0, 10, 31], 6) == [25, 26, 27, 28, 29, 30]  # a chunk too long dilutes: its newest, by recency
    assert picked([0], 6) == [30, 31, 32, 33, 34, 35]


def test_pages_begin_where_positions_say() -> None:
    made = Sparse(Prefill(torch.ones(1), unit=8), 0, None, NONE, Board())
    assert made._cuts(0, 48, 4, 29)[0].tolist() == [4, 8, 16, 24]
    assert made._cuts(0, 48, 8, 9)[0].tolist() == [8]


@pytest.mark.parametrize("mode", ["predicted", "labels", "blocks", "a-shape", "vertical-slash"])
def test_a_budget_of_the_prompt_is_dense(mode: str) -> None:
    model, ids = models.shared("llama"), random_ids(1, 50, seed=3)
    made = dhsa(model, mode=mode, steps=2)
    assert error(feed(model, SegmentCache(model, made), ids, [48, 1, 1]), own(model, ids)) > 1e-2
    whole = dhsa(model, mode=mode, steps=2, budget=50)
    close(feed(model, SegmentCache(model, whole), ids, [48, 1, 1]), own(model, ids))


def test_training_learns_and_is_kept() -> None:
    model = models.shared("llama")
    made = dhsa(model, steps=120)
    losses = made.evidence["loss"]
    assert float(losses[-10:].mean()) < 0.8 * float(losses[:10].mean())
    assert made.read is not None
    assert made.read.prefill is not None
    tables = made.read.prefill.tables
    assert tables["embed"].shape == (6, 16)
    assert 0 < made.provenance["facts"]["boundaries"] <= 8 / 8
    same(dhsa(model, steps=120).evidence["loss"], losses)


def test_networks_are_reused(tmp_path) -> None:
    model = models.shared("llama")
    made = dhsa(model, steps=3)
    path = made.write(str(tmp_path / "plan"))
    again = dhsa(model, weights=path, budget=0.5)
    assert made.read is not None
    assert again.read is not None
    assert made.read.prefill is not None
    assert again.read.prefill is not None
    for name, table in made.read.prefill.tables.items():
        same(again.read.prefill.tables[name], table)
    for other in (dict(layer=1), dict(window=3)):
        with pytest.raises(InputError, match="no network for this layer"):
            dhsa(model, weights=path, **other)


def test_how_a_network_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three guesses at one boundary find one boundary."""
    label, logits = torch.zeros(1, 60, dtype=torch.bool), torch.full((1, 60), -5.0)
    label[0, [10, 20]], logits[0, [9, 10, 11, 40]] = True, torch.tensor(5.0)
    monkeypatch.setattr(predicted, "logits", lambda keys, tables, window: logits)
    found = _boundaries.found([(torch.zeros(1, 60, 8), label)], {}, Options(apart=0, block=8))
    assert found == {"precision": 3 / 4, "recall": 1 / 2, "boundaries": 2 / 60, "predicted": 4 / 60}


def test_a_network_can_tell_a_change_of_keys() -> None:
    """Keys that jump at known places: trained on some, it finds others."""
    draws = torch.Generator().manual_seed(0)

    def text() -> tuple[torch.Tensor, torch.Tensor]:
        topics = 3 * torch.linalg.qr(torch.randn(8, 8, generator=draws))[0][:6].repeat_interleave(10, 0)
        jumps = (torch.arange(60) % 10 == 0)[None]
        return (topics + 0.1 * torch.randn(60, 8, generator=draws))[None], jumps

    shapes = {"embed": (8, 8), "pool": (8,), "hidden": (16, 33), "shift": (16,), "last": (17,)}
    tables = {name: (0.3 * torch.randn(shape, generator=draws)).requires_grad_(True) for name, shape in shapes.items()}
    optimiser = torch.optim.Adam(tables.values(), lr=0.02)
    rare = torch.tensor(9.0)
    for _ in range(300):
        keys, jumps = text()
        logits = predicted.logits(keys, tables, 4)
        known = torch.isfinite(logits)
        loss = functional.binary_cross_entropy_with_logits(logits[known], jumps[known].float(), pos_weight=rare)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    keys, jumps = text()
    found = boundaries.chosen(predicted.logits(keys, tables, 4), 0.0, 4, 9)
    assert found[0].nonzero().flatten().tolist() == [10, 20, 30, 40, 50]


def test_boundaries_do_not_depend_on_where_the_prompt_stands() -> None:
    """Keys are read before RoPE, and boundaries are made once for all layers."""
    model, ids = models.double("llama"), random_ids(1, 40, seed=4)
    made = dhsa(model, steps=3)
    near, far = (feed(model, SegmentCache(model, made), ids, [38, 1, 1], shift=shift) for shift in (0, 1000))
    close(near, far, torch.float32)
    cache = SegmentCache(model, made)
    seen: list[int] = []
    board = cache.segments[0].sparse.board  # type: ignore[union-attr]
    for layer in cache.segments:
        layer.done = partial(lambda done: (seen.append(len(board.boundaries)), done()), layer.done)
    feed(model, cache, ids, [40])
    assert seen == [1, 1, 1]
    assert not board.boundaries
    assert not board.cuts


def test_more_budget_less_error(induction: Model) -> None:
    """The second copy of a text, read by a prompt that may look back at less and less of the first."""
    ids = torch.stack([repeated(24, 3, seed=seed) for seed in range(2)])
    full, errors = own(induction, ids).log_softmax(-1), []
    for budget in (4, 16, 40, 80):
        made = dhsa(induction, mode="blocks", budget=budget, unit=4, block=8, local=2, dense=0)
        logits = feed(induction, SegmentCache(induction, made), ids, [72]).log_softmax(-1)
        errors.append(float((full.exp() * (full - logits)).sum(-1)[:, 24:].mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"budget": 0.0}, {"theta": 0.5}, {"sure": 1.0}, {"mode": "some"}, {"layer": 9}, {"samples": 2}, {"theta": 1e9}],
)
def test_bad_options(settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        dhsa(models.shared("llama"), **settings)
