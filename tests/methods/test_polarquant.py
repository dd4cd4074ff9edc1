"""Known answers of PolarQuant, card B13 a, and a planted case: keys that only RoPE moves are all angle."""

from __future__ import annotations

import math

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding.codecs import Nested
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.methods.polarquant import at
from kvtool.model import Model
from kvtool.plan import Plan
from tests import models
from tests.methods.coding import bits, entries, share, there_and_back
from tests.tolerance import close, same

HALF = math.pi * torch.finfo(torch.float16).eps  # ranges are kept in fp16


def polarquant(model: Model, **settings: object) -> Plan:
    return calibrate("polarquant", settings, model=model)


def keys(model: Model, **settings: object) -> Encoding:
    store = polarquant(model, **settings).store
    assert store is not None
    return store.keys[0]


def turned(model: Model, tokens: int) -> torch.Tensor:
    """One key at every position, [1,K,T,D]."""
    rotary = model.rotary(0)
    k = entries(1, 2, 1, 8).expand(-1, -1, tokens, -1)
    return rotary.rotate(k, rotary.table(torch.arange(tokens)))


def test_keys_that_only_rope_moves_need_no_bits_for_radii(llama: Model) -> None:
    k = turned(llama, 128)
    one, eight = (there_and_back(keys(llama, radius=bits), k) for bits in (1, 8))
    radii = [torch.hypot(*x.chunk(2, -1)) for x in (one, eight, k)]
    for found in radii[:2]:
        close(found, radii[2], torch.float16)
    same(one.signbit(), eight.signbit())
    worst = float((one - k).norm(dim=-1).max() / k.norm(dim=-1).max())
    assert worst < math.pi / 2**4  # half of a cell of all angles, on the arc


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_errors_along_the_arc(bits: int, llama: Model) -> None:
    """At most half of a cell's angle times the radius; across it, half of the radii's range over 2^bits."""
    k = entries(1, 2, 128, 8)
    back = there_and_back(keys(llama, angle=bits, radius=bits), k)
    pairs = [torch.complex(*x.chunk(2, -1)) for x in (k, back)]
    angle = (pairs[1] / pairs[0]).angle().abs()
    assert float(angle.max()) <= math.pi / 2**bits + HALF
    spread = pairs[0].abs().amax(2, keepdim=True) - pairs[0].abs().amin(2, keepdim=True)
    assert bool(((pairs[1].abs() - pairs[0].abs()).abs() <= spread / 2**bits / 2 + HALF).all())


def test_bits_as_released(induction: Model) -> None:
    plan = polarquant(induction)
    assert plan.store is not None
    assert bits(plan.store.keys[0], 4, 128) == (4 + 4) / 2 + 32 / 128
    assert plan.store.values[0].lossless
    assert bits(polarquant(induction, values=2).store.values[0], 4, 128) == 3  # type: ignore[union-attr]


def test_nested_angles(induction: Model) -> None:
    """From memory 3.875 bits; a number that stands out is shared among all, so that no entry is worse off for it."""
    plan = polarquant(induction, form="nested")
    assert plan.store is not None
    key, value = plan.store.keys[0], plan.store.values[0]
    wide = Nested()
    assert key.codec == value.codec == wide
    assert sum(x.nbytes for x in wide.encode(entries(1, 1, 8, 128)).values()) * 8 / (8 * 128) == 3.875
    even, spiky = entries(1, 4, 64, 128), entries(1, 4, 64, 128)
    spiky[..., 5] *= 50
    lost = [float((there_and_back(key, x) - x).square().sum() / x.square().sum()) for x in (even, spiky)]
    assert lost[1] < 1.5 * lost[0]
    bare = [there_and_back(Encoding(wide), x) for x in (even, spiky)]
    assert float((bare[1] - spiky)[..., :5].square().sum()) > 3 * float((bare[0] - even)[..., :5].square().sum())


def test_turning_query_and_keys_alike_leaves_products() -> None:
    """RoPE moves a pair's angle, so a code and its query may both be moved."""
    model = models.shared("llama")
    rotary, key = model.rotary(0), keys(model, group=8, block=8)
    q, back = entries(1, 2, 1, 8, seed=1), there_and_back(key, entries(1, 2, 8, 8))
    by = [rotary.rotate(x, rotary.table(torch.full((x.shape[2],), 9))) for x in (q, back)]
    close(by[0] @ by[1].mT, q @ back.mT)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125, 0.11])
def test_options_under_a_budget(budget: float, induction: Model) -> None:
    assert 0.75 * budget - 0.02 < share(polarquant(induction, **at(budget))) <= budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(values=9), "bad option values"), (dict(angle=0), "bad bits"), (dict(group=12), "bad group along tokens"),
     (dict(group=64, block=32), "bad block")],
)  # fmt: skip
def test_refusals(settings: dict[str, object], message: str, llama: Model) -> None:
    with pytest.raises(InputError, match=message):
        polarquant(llama, **settings)
