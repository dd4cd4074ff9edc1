"""Known answers of CSKV, card B22."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.corpus.base import Sample
from kvtool.errors import InputError
from kvtool.methods import _branch
from kvtool.methods._base import Context
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.methods.training import interrupted
from tests.models import random_ids, with_tokenizer
from tests.running import feed, own
from tests.statistics.naive import written_down
from tests.tolerance import close, same

IDS = random_ids(1, 44, seed=4)
SMALL = dict(samples=1, tokens=256, steps=30, recent=0, lr=1e-2)


def cskv(model: Model, **settings: object) -> Plan:
    return calibrate("cskv", {**SMALL, **settings}, model=with_tokenizer(model))


TEXT = Sample(random_ids(1, 256, seed=5)[0], "text")  # its inputs span all directions


@functools.cache
def seen() -> _branch.Seen:
    model = models.shared("llama")
    return _branch.observed(Context(model.geometry, model), [TEXT], [0, 1, 2])


@pytest.mark.parametrize("rank", [3, 8])
def test_asvd_begins_with_the_weights_own_decomposition(rank: int) -> None:
    """Card: SVD of D W, D = diag(a^½), a = mean |x|, with the true weights and inputs, by numpy."""
    model = models.shared("llama")
    start, _ = _branch.begun(seen(), (rank, rank), asvd=True, mixed=False)
    for at, (layer, noted) in enumerate(zip(model.network.model.layers, written_down(model, TEXT.tokens), strict=True)):
        x = layer.input_layernorm(noted.before)
        size = (x.abs().mean(0) + 1e-6).sqrt()
        for side, weight in (("keys", layer.self_attn.k_proj.weight), ("values", layer.self_attn.v_proj.weight)):
            right = torch.from_numpy(np.linalg.svd((size[:, None] * weight.T).numpy())[2][:rank])
            down, up = start[f"{side}.down"][at], start[f"{side}.up"][at]
            close(down @ up, right.T @ right)
            plain = torch.from_numpy(np.linalg.svd(weight.T.numpy())[2][:rank])  # D = I
            assert float((down @ up - plain.T @ plain).abs().max()) > 1e-3


@pytest.mark.parametrize("ranks", [(2, 5), (8, 8), (15, 16)])
def test_the_loss_at_the_start_is_the_truncation_error(ranks: tuple[int, int]) -> None:
    start, bound = _branch.begun(seen(), ranks, asvd=False, mixed=False)
    found = _branch.losses(seen(), start, {"keys": None, "values": None})
    close(found, bound)
    for side, (x, rank) in enumerate(zip(seen().x, ranks, strict=True)):
        sigma = np.linalg.svd(x.double().numpy(), compute_uv=False)
        dropped = (sigma[:, rank:] ** 2).sum(1) / (sigma**2).sum(1)
        close(bound[:, side], torch.from_numpy(dropped).float())


def test_training_from_asvd_comes_to_the_bound_and_not_below(llama: Model) -> None:
    made = cskv(llama, steps=150, budget=0.5)
    start, end, bound = (made.evidence[name] for name in ("start", "end", "bound"))
    assert bool((bound <= end + 1e-6).all())
    assert float((end - bound).mean()) < 0.1 * float((start - bound).mean())
    assert float(start.mean()) > 1.5 * float(bound.mean())
    already = cskv(llama, start="pca", steps=20, budget=0.5).evidence
    close(already["end"], already["start"])


def test_codes_are_trained_with(llama: Model) -> None:
    """Straight through codes of 2 bits the loss falls, of keys and values alike."""
    made = cskv(llama, bits=2, budget=0.125, start="pca", steps=60)
    assert bool((made.evidence["end"] <= made.evidence["start"]).all())
    assert bool((made.evidence["end"].mean(0) < 0.9 * made.evidence["start"].mean(0)).all())
    cache = SegmentCache(llama, made)
    feed(llama, cache, random_ids(1, 64, seed=1), [64])
    held = sum(lane.bulk.read_bytes() for layer in cache.segments for lane in layer.lanes())
    numbers = 3 * 64 * 16  # of keys, and of values
    assert held * 8 == numbers * (2 + 32 / 32) + numbers * (2 + 32 / 16)  # ranges: of 32 entries, and of 16 channels


def test_an_open_window_is_exact(llama: Model) -> None:
    made, ids = cskv(llama, steps=2, budget=0.2, block=32), random_ids(1, 40, seed=7)
    found, expected = (
        feed(llama, cache, ids, [20, *[1] * 20]) for cache in (SegmentCache(llama, made), SegmentCache(llama))
    )
    same(found[:, :32], expected[:, :32])
    assert float((found[:, 32:] - expected[:, 32:]).abs().max()) > 1e-2


def test_the_whole_width_is_exact_and_not_trained(llama: Model) -> None:
    made = cskv(llama, budget=1.0)
    assert len(made.evidence["loss"]) == 0
    close(feed(llama, SegmentCache(llama, made), IDS, [36, *[1] * 8]), own(llama, IDS))


def test_the_bound_falls_with_rank(llama: Model) -> None:
    bounds = [_branch.begun(seen(), (rank, rank), asvd=True, mixed=False)[1].mean() for rank in (1, 4, 8, 12, 16)]
    assert all(less < more for more, less in itertools.pairwise(bounds))


def test_an_interrupted_training_resumes_where_it_was(tmp_path: Path, llama: Model) -> None:
    seen = interrupted("cskv", {**SMALL, "steps": 14}, with_tokenizer(llama), tmp_path, 11)
    assert next(done for done in seen if done) == 11


def test_impossible_options(llama: Model) -> None:
    for settings in (dict(budget=0.0), dict(bits=9), dict(key_share=1.5), dict(steps=0)):
        with pytest.raises(InputError):
            cskv(llama, **settings)
