"""Known answers of ShadowKV, cards C2 and B24."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool.cache.read.board import Board, Place
from kvtool.cache.read.reader import Reader
from kvtool.cache.segment_cache import SegmentCache
from kvtool.calibrate import calibrate
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Read
from tests import models
from tests.laws.methods import trace
from tests.models import random_ids, repeated
from tests.running import feed, own
from tests.tolerance import close, error, same

IDS, CHUNKS = random_ids(1, 60, seed=7), [50, *[1] * 10]
RANK = 5
MODES = pytest.mark.parametrize("mode", ["prompt", "calibrated"])


def narrow() -> Model:
    """Keys before RoPE of both KV heads lie in RANK of 16 directions."""
    model = models.build("llama")
    for at, layer in enumerate(model.network.model.layers):
        basis = torch.linalg.qr(torch.randn(16, RANK, generator=torch.Generator().manual_seed(at)))[0]
        layer.self_attn.k_proj.weight.copy_(basis @ basis.T @ layer.self_attn.k_proj.weight)
    model.network.double()
    return model


def made(model: Model, **settings: Any) -> Plan:
    options = dict(budget=0.3, rank=RANK, chunk=4, outliers=0, local=1) | settings
    seen = trace(model, ("gram",)) if options.get("mode") == "calibrated" else None
    return calibrate("shadowkv", options, model=model, trace=seen)


def run(model: Model, plan: Plan) -> tuple[torch.Tensor, SegmentCache]:
    cache = SegmentCache(model, plan)
    return feed(model, cache, IDS, CHUNKS), cache


@MODES
def test_keys_of_few_directions_are_rebuilt(mode: str) -> None:
    """With as many directions, chunks are chosen and read as they are; with fewer they are not."""
    model = narrow()
    plan = made(model, mode=mode)
    raw = own(model, IDS)
    everything = replace(plan, read=None)
    close(run(model, everything)[0], raw, torch.float32)
    logits, _ = run(model, plan)
    assert error(logits, raw) > 1e-2
    few, _ = run(model, replace(made(model, mode=mode, rank=RANK - 2), read=None))
    assert error(few, raw) > 1e-2


@MODES
def test_all_outliers_are_dense(mode: str) -> None:
    """Whatever the rank: they are read as they came."""
    model = models.double("llama")
    close(run(model, made(model, mode=mode, rank=2, outliers=99))[0], own(model, IDS))
    assert error(run(model, made(model, mode=mode, rank=2, budget=99))[0], own(model, IDS)) > 1e-2


def test_chunks_of_equal_keys_are_no_outliers() -> None:
    k = torch.randn(1, 2, 8, 4, 6, generator=torch.Generator().manual_seed(1))
    k[0, 0, 3] = k[0, 0, 3, :1]
    k[0, 1, 5] = k[0, 1, 5, :1]
    spec = Read(torch.tensor([0.1]), unit=4, summary="mean", outliers=7, exact=True)
    reader = Reader(spec, Place(0, 0, (0, 1), Board()))
    for part in k.split(2, 2):  # as they come
        reader.append(part.flatten(2, 3), part.flatten(2, 3))
    units = reader.units
    assert units.rarest is not None
    assert [set(range(8)) - set(row) for row in units.rarest[0].tolist()] == [{3}, {5}]
    same(units.raw[0], k.gather(2, units.rarest[..., None, None].expand(-1, -1, -1, 4, 6)))


def test_what_is_decoded_stays_raw() -> None:
    model = models.shared("llama")
    for mode, held in (("prompt", 44), ("calibrated", 56)):
        for layer in run(model, made(model, mode=mode))[1].segments:
            (lane,) = layer.lanes()
            assert lane.bulk.length == held
            assert lane.recent.length == 60 - held


def test_bytes_moved_and_held() -> None:
    """Each step fetches, of the chosen entries, RANK numbers for each KV head, and values."""
    model = models.shared("llama")
    _, cache = run(model, made(model, budget=8, outliers=1))
    g, chosen = model.geometry, 8 + 4
    assert cache.moved_bytes == 10 * g.layers * g.kv_heads * chosen * (RANK + g.head_dim) * 4
    (lane,) = cache.segments[0].lanes()
    assert sum(x.nbytes for x in lane.bulk.parts["key"].values()) == 44 * RANK * 4
    assert lane.reader.units.exact_bytes() == g.kv_heads * 4 * 2 * g.head_dim * 4
    assert sum(x.nbytes for x in lane.reader.units.parts) == g.kv_heads * 11 * g.head_dim * 4


def test_the_needle_is_read(induction: Model) -> None:
    """Chunks of two entries, the copied one's among those read."""
    ids = repeated(40, 2)[None]
    plan = calibrate("shadowkv", dict(budget=8, rank=1.0, chunk=2, outliers=0, local=1), model=induction)
    logits = feed(induction, SegmentCache(induction, plan), ids, [44, *[1] * 36])
    assert float((logits[0, 44:-1].argmax(-1) == ids[0, 45:]).float().mean()) > 0.9


def test_directions_that_cannot_be() -> None:
    with pytest.raises(InputError, match="more directions"):
        made(models.shared("llama"), rank=17)
