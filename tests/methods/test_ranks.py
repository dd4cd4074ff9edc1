"""Bases and ranks that low-rank methods share, against numpy's SVD and against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvtool.errors import InputError
from kvtool.methods import _ranks
from tests.tolerance import close


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rough(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated channels of different sizes, [T,width]."""
    return draw(tokens, width, seed=seed) @ draw(width, width, seed=seed + 1) * torch.linspace(0.2, 2, width).double()


@pytest.mark.parametrize("rank", [0, 1, 5, 8])
def test_the_error_is_the_energy_that_numpys_svd_drops(rank: int) -> None:
    x = rough(60, 8)
    energy, basis = _ranks.principal(x.T @ x)
    singular = torch.from_numpy(np.linalg.svd(x.numpy(), compute_uv=False))
    close(energy, singular.square())
    error = (x - x @ basis[:, :rank] @ basis[:, :rank].T).square().sum()
    close(error, singular[rank:].square().sum())
    close(_ranks.left(energy)[rank], error / x.square().sum())


@pytest.mark.parametrize("rank", [2, 5])
def test_the_whitened_svd_of_a_projection_is_the_pca_of_its_output(rank: int) -> None:
    """Card B19: SVD(W S) with S S' = X'X truncated, S undone, against our projection of k = W x."""
    x, weight = rough(200, 12, seed=3), draw(8, 12, seed=5)
    whitener = torch.linalg.cholesky(x.T @ x)
    left, sigma, right = np.linalg.svd((weight @ whitener).numpy(), full_matrices=False)
    truncated = torch.from_numpy(left[:, :rank] * sigma[:rank] @ right[:rank]) @ torch.linalg.inv(whitener)
    keys = x @ weight.T
    basis = _ranks.principal(keys.T @ keys)[1][:, :rank]
    close(keys @ basis @ basis.T, x @ truncated.T)
    assert float((torch.linalg.svd(weight)[0][:, :rank].T @ basis).det().abs()) < 0.99  # plain SVD is another basis


def test_isotropic_inputs_make_it_the_plain_svd() -> None:
    weight = draw(6, 12, seed=5)
    keys = torch.linalg.qr(draw(40, 12))[0] @ weight.T
    plain = torch.linalg.svd(weight)[0][:, :3]
    basis = _ranks.principal(keys.T @ keys)[1][:, :3]
    close(basis @ basis.T, plain @ plain.T)


def test_groups_are_the_diagonal_blocks() -> None:
    x = rough(30, 24)
    blocks = _ranks.grouped((x.T @ x)[None], 6, 2)
    for at in range(3):
        part = x[:, 8 * at : 8 * at + 8]
        close(blocks[0, at], part.T @ part)


@pytest.mark.parametrize(("kv_heads", "most", "count"), [(8, 4, 4), (3, 4, 3), (6, 4, 3), (5, 4, 1), (1, 4, 1)])
def test_groups_divide_the_heads(kv_heads: int, most: int, count: int) -> None:
    assert _ranks.neighbours(kv_heads, most) == count


@pytest.mark.parametrize("steps", [3, 7, 12, 17, 24])
def test_greedy_ranks_are_the_best_of_all(steps: int) -> None:
    energy = torch.stack([_ranks.principal(x.T @ x)[0] for x in (rough(40, 8, seed=s) for s in (1, 2, 3))])
    dropped = _ranks.left(energy)
    choices = [ranks for ranks in itertools.product(range(1, 9), repeat=3) if sum(ranks) == steps]
    least = min(sum(float(dropped[m, r]) for m, r in enumerate(ranks)) for ranks in choices)
    found = _ranks.greedy(dropped, steps, 1).tolist()
    assert sum(found) == steps
    assert sum(float(dropped[m, r]) for m, r in enumerate(found)) == pytest.approx(least)


def test_proportional_ranks() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0]).double()
    assert _ranks.proportional(weights, 16, 12).tolist() == [2, 4, 10]
    assert _ranks.proportional(weights, 16, 7).tolist() == [3, 6, 7]  # what the last may not take goes to the others
    assert _ranks.proportional(weights, 36, 12).tolist() == [12, 12, 12]
    assert _ranks.proportional(torch.tensor([0.0, 0.0, 1.0]).double(), 9, 12).tolist() == [1, 1, 7]


@pytest.mark.parametrize("seed", range(20))
def test_proportional_ranks_spend_what_there_is(seed: int) -> None:
    weights = draw(7, seed=seed).exp().square()
    for steps in (7, 20, 50, 69, 70):
        dealt = _ranks.proportional(weights, steps, 10)
        assert int(dealt.sum()) == steps
        assert 1 <= int(dealt.min()) <= int(dealt.max()) <= 10
        order = weights.argsort()
        assert bool((dealt[order].diff() >= 0).all())  # who weighs more never gets less


@pytest.mark.parametrize("rank", [1, 3, 8, 24, 96, 128])
def test_mixing_is_orthogonal_and_flat(rank: int) -> None:
    made = _ranks.mix(rank)
    close(made @ made.T, torch.eye(rank).double())
    assert float(made.abs().max()) <= (2 / rank) ** 0.5 + 1e-12


def test_mixing_leaves_what_is_rebuilt_unchanged() -> None:
    x = rough(20, 16).float()[None, None]
    basis = _ranks.principal(x[0, 0].T.double() @ x[0, 0].double())[1][None]
    plain, mixed = (
        _ranks.projection(basis, 8, 1, bits=bits).transforms[0] for bits in (16, 8)
    )  # fmt: skip
    close(mixed.inverse(mixed.forward(x)), plain.inverse(plain.forward(x)))
    spread = [float(step.forward(x).square().mean((0, 1, 2)).std()) for step in (plain, mixed)]
    assert spread[1] < 0.5 * spread[0]


def test_codes_want_whole_bytes() -> None:
    with pytest.raises(InputError, match="multiple"):
        _ranks.check_bits(4, 12)
    with pytest.raises(InputError, match="bits"):
        _ranks.check_bits(12, 8)
