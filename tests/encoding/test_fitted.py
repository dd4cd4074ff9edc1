"""Transforms and codecs that fit themselves to a prompt: what they choose, and that the choice does its work."""

from __future__ import annotations

import pytest
import torch

from kvtool.encoding.codecs import Affine, Levels
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.fitted import Balance, Principal, Ranges, Root, Spread, Strongest
from kvtool.encoding.transforms import Gather, Join, Linear, Scale
from tests.tolerance import close, same

DRAW = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def test_balance_makes_both_sides_equally_large() -> None:
    k, q = random(1, 2, 40, 8), random(1, 2, 30, 8)
    k[..., 3] *= 50
    step = Balance().fit(k, q)
    assert isinstance(step, Scale)
    balanced, asked = step.forward(k), step.query(q)[0]
    close(balanced.abs().amax(2), asked.abs().amax(2))
    close(balanced.abs().amax(2), (k.abs().amax(2) * q.abs().amax(2)).sqrt())
    close(asked @ balanced.mT, q @ k.mT)


def test_balance_of_nothing_is_bounded() -> None:
    k, q = torch.zeros(1, 1, 5, 4), random(1, 1, 3, 4)
    assert bool(torch.isfinite(Balance().fit(k, q).forward(k)).all())
    assert float((1 / Balance().fit(k, q).scale).max()) <= 1e3 * (1 + 1e-6)


def test_root_takes_the_root_of_the_largest() -> None:
    v = torch.tensor([[4.0, 0.0, -9.0], [-1.0, 0.0, 1.0]])[None, None]
    same(Root().fit(v, None).scale, torch.tensor([[2.0, 1.0, 3.0]]))


def test_the_strongest_channels_are_those_of_queries_and_keys() -> None:
    k, q = random(1, 1, 50, 6), random(1, 1, 20, 6)
    k[..., 1], q[..., 4] = 0, 0  # nothing to find, and nothing asked
    step = Strongest(4, 8).fit(k, q)
    assert isinstance(step, Gather)
    same(step.index, torch.tensor([[0, 2, 3, 5]]))
    close(step.query(q)[0] @ step.forward(k).mT, q @ k.mT)
    same(Strongest(4, 8).fit(k, 3 * q).index, step.index)


def test_spread_puts_the_widest_first() -> None:
    x = torch.stack([torch.linspace(0, width, 5) for width in (1.0, 3.0, 2.0)], dim=-1)[None, None]
    same(Spread(1).fit(x, None).index, torch.tensor([[1, 0, 2]]))
    same(Spread(2).fit(x, None).index, torch.tensor([[1, 2, 0]]))
    same(Spread(0).fit(x, None).index, torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("slices", [1, 2])
def test_principal_directions_lose_the_dropped_energy(slices: int) -> None:
    x = random(1, 2, 60, 8)
    x[..., 4:] *= 100  # a loud half
    step = Principal(3, slices).fit(x, None)
    assert isinstance(step, Linear)
    halves = x[0].unflatten(-1, (slices, -1))
    size = halves.square().mean((1, 3), keepdim=True).sqrt().expand_as(halves).flatten(2)
    unit, lost = x[0] / size, (x[0] - step.inverse(step.forward(x))[0]) / size
    energy = torch.linalg.svdvals(unit)[:, 3:].square().sum(-1)
    close(lost.square().sum((1, 2)), energy)
    close(Principal(8, slices).fit(x, None).inverse(Principal(8, slices).fit(x, None).forward(x)), x)


def test_few_entries_make_a_small_basis() -> None:
    """Directions that no entry has are left out: they would be drawn by rounding."""
    x = random(1, 2, 3, 8)
    x[:, 1, 2] = x[:, 1, 1]
    step = Principal(6).fit(x, None)
    assert isinstance(step, Linear)
    assert step.down.shape == (2, 8, 3)
    close(step.inverse(step.forward(x)), x)
    same(step.down[1, :, 2], torch.zeros(8))


def test_ranges_are_those_of_the_prompt() -> None:
    x = random(1, 2, 30, 8)
    codec = Ranges(3).fit(x)
    assert isinstance(codec, Levels)
    out = codec.decode(codec.encode(x), 8)
    step = (x.amax(2) - x.amin(2))[:, :, None] / 7
    assert bool(((out - x).abs() <= step / 2 * (1 + 1e-5)).all())
    later = codec.decode(codec.encode(10 * x), 8)
    assert bool((later <= x.amax(2, keepdim=True) + 1e-5).all())
    assert bool((later >= x.amin(2, keepdim=True) - 1e-5).all())


def test_an_encoding_fits_step_by_step() -> None:
    """Each step sees what the steps before it make of the entries, and of the queries."""
    k, q = random(1, 2, 40, 8), random(1, 2, 12, 8)
    made = Encoding(Affine(4, 16, "channel"), (Join(2), Strongest(16, 12))).fitted(k, q)
    assert not made.fits
    assert isinstance(made.transforms[1], Gather)
    assert made.transforms[1].index.shape == (1, 16)
    assert Encoding(transforms=(Strongest(3, 12), Balance())).observed == -1
    assert Encoding(transforms=(Strongest(3, 12),)).observed == 12
