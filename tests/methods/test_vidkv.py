"""VidKV: the Fourier basis, which channels are hard, and what groups come back exactly."""

from __future__ import annotations

import pytest
import torch

from kvtool.encoding.codecs import Ternary
from kvtool.encoding.encoding import Encoding
from kvtool.methods.vidkv import fourier
from tests import models
from tests.laws.methods import plan
from tests.methods.coding import bits, entries, there_and_back
from tests.tolerance import close, same


def key(**settings: object) -> Encoding:
    store = plan("vidkv", models.shared("llama"), {"group": 8, "block": 8, **settings}).store
    assert store is not None
    return store.keys[0]


@pytest.mark.parametrize("n", [1, 2, 5, 8, 33, 64])
def test_the_fourier_basis_is_orthonormal_and_of_as_many_numbers(n: int) -> None:
    basis = fourier(n)
    close(basis.T @ basis, torch.eye(n, dtype=torch.float64))
    wave = (3 * torch.arange(n).double() * 2 * torch.pi / n).cos()
    if n > 8:
        assert int((wave @ basis).abs().gt(1e-9).sum()) == 1  # one frequency, one number


def test_the_widest_channels_are_hard() -> None:
    k = entries(1, 2, 32, 8)
    k[:, 0, :, 3] *= 30
    k[:, 1, :, 6] *= 30
    made = key(wide=0.5).fitted(k, None)
    order = made.transforms[0].index  # type: ignore[attr-defined]
    ranges = (k[0].amax(1) - k[0].amin(1)).gather(1, order)
    assert bool((ranges[:, :4].amin(1) > ranges[:, 4:].amax(1)).all())
    assert 3 in order[0, :4]
    assert 6 in order[1, :4]
    assert order.sort(-1).values.tolist() == [list(range(8))] * 2


@pytest.mark.parametrize("mode", ["prompt", "calibrated"])
def test_easy_channels_stay_in_their_order(mode: str) -> None:
    """Neighbouring frequencies of a token are made of neighbouring channels, however wide each of these is."""
    made = key(wide=0.25, mode=mode)
    made = made.fitted(entries(1, 2, 32, 8) * torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6]), None) if made.fits else made
    order = made.transforms[0].index  # type: ignore[attr-defined]
    for part in (order[:, :2], order[:, 2:]):
        assert bool((part.diff(dim=-1) > 0).all())
    if mode == "prompt":
        assert order[:, :2].tolist() == [[1, 3], [1, 3]]


def test_signs_are_exact_for_two_numbers() -> None:
    """A group of ±a comes back, if all channels are easy and no transform stands before the signs."""
    a = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 1.0, 2.0, 8.0])
    x = a * (1 - 2.0 * torch.randint(2, (1, 2, 16, 8), generator=torch.Generator().manual_seed(0)))
    made = key(wide=0.0, frequencies=False).fitted(x, None)
    same(there_and_back(made, x), x)


def test_ternary_values_have_their_scale() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[:, :, ::2], x[:, :, 1::4] = 2.0, -2.0
    same(there_and_back(Encoding(Ternary(8, "token")), x), x)


def test_slow_channels_err_less_as_frequencies() -> None:
    """Channels that vary slowly along a token have their energy in few frequencies."""
    phase = entries(1, 2, 64, 1)
    x = 3 + torch.sin(phase + torch.arange(8) / 4) + 0.05 * entries(1, 2, 64, 8, seed=1)
    errors = []
    for frequencies in (True, False):
        made = key(wide=0.0, frequencies=frequencies).fitted(x, None)
        errors.append(float((there_and_back(made, x) - x).square().mean()))
    assert errors[0] < 0.85 * errors[1]


def test_bits_held() -> None:
    """At g = 32: 2 + 1 bits for hard channels, 1 + 1/2 for easy ones; 1.6 + 1/2 for values, in whole bytes."""
    store = plan("vidkv", models.shared("llama"), {}).store
    assert store is not None
    made = store.keys[0].fitted(entries(1, 2, 32, 8), None)
    assert bits(made, 2, 8) == (3 + 1.5) / 2
    assert bits(store.values[0], 2, 8) == 7 * 8 / 32 + 0.5
