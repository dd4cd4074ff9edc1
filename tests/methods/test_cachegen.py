"""Known answers of CacheGen, card B9. Those of its entropy coder are in tests/encoding/test_entropy.py."""

from __future__ import annotations

import pytest
import torch

from kvtool import options
from kvtool.cache.segment_cache import SegmentCache
from kvtool.encoding.codecs import Delta
from kvtool.errors import InputError
from kvtool.methods import cachegen
from kvtool.methods._base import Context
from kvtool.methods.cachegen import LEVELS, Options, symmetric
from kvtool.model import Geometry, Model
from kvtool.slots import Store
from tests.laws.methods import plan
from tests.models import random_ids
from tests.running import feed
from tests.tolerance import close, same

MISTRAL = Geometry("mistral", 32, 32, 8, 128, 4096, 32000, (None,) * 32, "")


def store(geometry: Geometry = MISTRAL, **settings: object) -> tuple[Store, torch.Tensor]:
    made = cachegen.calibrate(Context(geometry), Options(**settings))  # type: ignore[arg-type]
    assert made.store is not None
    return made.store, made.evidence["bins"]


@pytest.mark.parametrize(
    ("level", "keys", "values"),
    [
        (1, [16] * 20 + [12] * 12, [16] * 2 + [12] * 30),
        (2, [32] * 10 + [16] * 22, [32] * 2 + [16] * 30),
        (3, [32] * 32, [32] * 32),
    ],
)
def test_the_bins_of_the_released_levels(level: int, keys: list[int], values: list[int]) -> None:
    made, bins = store(level=level)
    assert bins.tolist() == [keys, values]
    for layer in range(32):
        number = int(made.index[layer, 0])
        sizes = [len(side[number].codec.levels) for side in (made.keys, made.values)]
        assert sizes == [{32: 32, 16: 16, 12: 16}[count] for count in (keys[layer], values[layer])]


@pytest.mark.parametrize("bins", [4, 8, 12, 16, 32, 256])
def test_the_released_formula(bins: int) -> None:
    """code = round(x·M/m) + M, x̂ = (code − M)/M · m, and a scale in 16 bits."""
    x = torch.randn(1, 2, 50, 24, generator=torch.Generator().manual_seed(0))
    codec, most = symmetric(bins, 24), bins // 2 - 1
    top = x.abs().amax(-1, keepdim=True).half().float()
    expected = (x * most / top).round() / most * top
    close(codec.decode(codec.encode(x), 24), expected)
    assert int(((codec.decode(codec.encode(x), 24) - x).abs() > top / most * 0.51).sum()) == 0


def test_an_entry_of_zeros_is_exact() -> None:
    codec = symmetric(16, 8)
    x = torch.randn(1, 1, 6, 8)
    x[:, :, 2] = 0
    seen = codec.decode(codec.encode(x), 8)
    assert bool(torch.isfinite(seen).all())
    same(seen[:, :, 2], x[:, :, 2])


def test_deltas_of_equal_entries_are_all_zero() -> None:
    """Equal entries in 8 bits differ from their anchor by its error; the next group has another anchor."""
    first, second = torch.linspace(-2, 2, 8), torch.linspace(-3, 1, 8)
    codec = Delta(symmetric(256, 8), symmetric(16, 8), 10)
    grid = symmetric(256, 8)
    x = torch.stack([grid.decode(grid.encode(row[None, None, None]), 8)[0, 0, 0] for row in (first, second)])
    x = x.repeat_interleave(10, 0)[None, None]  # on the anchors' own grid, so that anchors are exact
    parts = codec.encode(x)
    assert not parts["rest.scale"].any()
    same(codec.decode(parts, 8), x)


def test_errors_do_not_add_up_within_a_group() -> None:
    """Each entry is predicted from the anchor as it is read back, not from its neighbour."""
    walk = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(1)).cumsum(2)
    codec = Delta(symmetric(256, 8), symmetric(256, 8), 10)
    error = (codec.decode(codec.encode(walk), 8) - walk).abs().amax(-1)[0, 0]
    largest = walk.abs().amax() + (walk.unflatten(2, (4, 10)) - walk[:, :, ::10, None]).abs().amax()
    assert float(error.max()) <= float(largest) / 127


def test_a_scale_is_of_all_heads_of_the_layer_or_of_each(llama: Model) -> None:
    g, ids = llama.geometry, random_ids(1, 40)
    for scale, count in (("layer", 1), ("head", g.kv_heads)):
        cache = SegmentCache(llama, plan("cachegen", llama, dict(scale=scale, level=3, block=10)))
        feed(llama, cache, ids, [40])
        bits = g.kv_heads * g.head_dim * 5 + 16 * count  # of one side of an entry
        assert cache.nbytes * 8 == 2 * g.layers * 40 * bits


def test_a_large_head_takes_levels_from_the_others_unless_each_has_a_scale() -> None:
    """Planted: head 0 is a hundred times head 1."""
    x = torch.randn(1, 2, 30, 8, generator=torch.Generator().manual_seed(2)) * torch.tensor([100.0, 1.0])[:, None, None]
    errors = {}
    for scale in ("layer", "head"):
        made, _ = store(Geometry("", 1, 2, 2, 8, 16, 10, (None,), ""), scale=scale)
        seen = made.keys[0].decode(made.keys[0].encode(x), 8)
        errors[scale] = float((seen - x)[:, 1].norm() / x[:, 1].norm())
    assert errors["layer"] > 0.9
    assert errors["head"] < 0.1


def test_bins_by_hand_and_a_budget() -> None:
    made, bins = store(key_bins=(64, 8), value_bins=(4,))
    assert bins.tolist() == [[64] * 16 + [8] * 16, [4] * 32]
    assert len(made.keys) == 2
    built = options.build(Options, cachegen.at(0.25), "cachegen")
    assert (built.key_bins, built.value_bins) == ((16,), (16,))


@pytest.mark.parametrize(
    "settings", [dict(level=4), dict(key_bins=(3,)), dict(value_bins=(257,)), dict(delta=True, group=7), dict(sink=-1)]
)
def test_refusals(settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        store(**settings)


def test_every_level_has_both_sides() -> None:
    assert {len(sides) for sides in LEVELS.values()} == {2}
