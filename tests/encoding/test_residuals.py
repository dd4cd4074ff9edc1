"""Residuals: outliers come back as they were, and the error basis takes away error and never adds any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from kvtool.encoding.codecs import Affine
from kvtool.encoding.encoding import Encoding
from kvtool.encoding.residuals import ErrorBasis, Outliers
from kvtool.errors import InputError
from tests.tolerance import close, same

BLOCK, WIDTH = 32, 64
Axis = Literal["token", "channel"]
AXES: tuple[Axis, ...] = ("token", "channel")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = normal(2, 3, 2 * BLOCK, WIDTH)


def planted(axis: Axis, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x with `count` large numbers in every vector, and where they are."""
    along = X.unflatten(2, (-1, BLOCK)).transpose(3, 4) if axis == "token" else X
    places = normal(*along.shape, seed=1).argsort(-1)[..., :count]
    mask = torch.zeros_like(along).scatter(-1, places, 1.0).bool()
    along = torch.where(mask, along.sign() * (20 + along.abs()), along.clamp(-2, 2))
    back = (lambda t: t.transpose(3, 4).flatten(2, 3)) if axis == "token" else lambda t: t
    return back(along), back(mask)


def outliers(axis: Axis, count: int) -> Outliers:
    return Outliers(count, axis, BLOCK if axis == "token" else 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("axis", AXES)
def test_planted_outliers_are_found_and_exact(axis: Axis, count: int) -> None:
    x, mask = planted(axis, count)
    bare, parts = outliers(axis, count).split(x)
    assert float(bare.abs().max()) <= 2
    same(bare[~mask], x[~mask])
    back = outliers(axis, count).join(torch.full_like(x, float("nan")), parts)  # whatever the codec made of them
    same(back.isnan(), ~mask)
    same(back[mask], x[mask].half().float())


@pytest.mark.parametrize("axis", AXES)
def test_an_encoding_keeps_them_exactly(axis: Axis) -> None:
    x, mask = planted(axis, 2)
    encoding = Encoding(Affine(2, BLOCK, axis), outliers=outliers(axis, 2))
    back = encoding.decode(encoding.encode(x), WIDTH)
    same(back[mask], x[mask].half().float())
    assert float((back - x)[~mask].abs().max()) < 1
    plain = Encoding(Affine(2, BLOCK, axis))
    assert float((plain.decode(plain.encode(x), WIDTH) - x)[~mask].abs().max()) > 3  # what they are taken out for


@pytest.mark.parametrize("axis", AXES)
def test_their_place_takes_the_mean_of_the_rest(axis: Axis) -> None:
    x, mask = planted(axis, 1)
    bare, _ = outliers(axis, 1).split(x)
    if axis == "token":
        bare, x, mask = (t.unflatten(2, (-1, BLOCK)).transpose(3, 4) for t in (bare, x, mask))
    rest = (x * ~mask).sum(-1, keepdim=True) / (~mask).sum(-1, keepdim=True)
    close(bare[mask], rest.expand_as(x)[mask])


def frobenius(encoding: Encoding, x: torch.Tensor = X) -> float:
    return float((encoding.decode(encoding.encode(x), x.shape[-1]) - x).norm())


@pytest.mark.parametrize("axis", AXES)
def test_more_outliers_are_closer(axis: Axis) -> None:
    errors = [frobenius(Encoding(Affine(2, BLOCK, axis), outliers=outliers(axis, n))) for n in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < frobenius(Encoding(Affine(2, BLOCK, axis)))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("more", [0, 5])
def test_all_of_them(axis: Axis, more: int) -> None:
    """A share of 100 %, or of more than there are numbers: x as fp16 holds it, whatever the codec."""
    count = (BLOCK if axis == "token" else WIDTH) + more
    encoding = Encoding(Affine(1, BLOCK, axis), outliers=outliers(axis, count))
    same(encoding.decode(encoding.encode(X), WIDTH), X.half().float())


@pytest.mark.parametrize("axis", AXES)
def test_bytes_of_outliers(axis: Axis) -> None:
    """16 bits for the place and 16 for the number."""
    _, parts = outliers(axis, 2).split(X)
    vectors = X.numel() // (BLOCK if axis == "token" else WIDTH)
    assert sum(tensor.nbytes for tensor in parts.values()) == vectors * 2 * 4


@pytest.mark.parametrize("size", [0.0, 1e-30, 6e4, 1e30])
@pytest.mark.parametrize("axis", AXES)
def test_hostile_numbers(axis: Axis, size: float) -> None:
    basis = ErrorBasis(2, BLOCK)
    encoding = Encoding(Affine(1, BLOCK, axis), outliers=outliers(axis, 2), error=basis)
    for x in (X.clamp(-1, 1) * size, torch.full_like(X, size)):
        assert bool(encoding.decode(encoding.encode(x), WIDTH).isfinite().all())


def reduced(error: torch.Tensor, basis: ErrorBasis) -> torch.Tensor:
    """What is left of the error of each block, [B,K,n]."""
    left = error - basis.add(torch.zeros_like(error), basis.of(error))
    return left.unflatten(2, (-1, basis.block)).flatten(3).norm(dim=-1)


def spectrum(error: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(error.unflatten(2, (-1, BLOCK)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_the_error_never_grows(rank: int, seed: int) -> None:
    error = normal(2, 3, 2 * BLOCK, WIDTH, seed=seed) * 10.0 ** (seed - 2)
    whole = error.unflatten(2, (-1, BLOCK)).flatten(3).norm(dim=-1)
    assert bool((reduced(error, ErrorBasis(rank, BLOCK)) < whole).all())


@pytest.mark.parametrize("size", [1e5, 1e8])
def test_the_error_does_not_grow_where_fp16_ends(size: float) -> None:
    error = X * size
    assert bool((reduced(error, ErrorBasis(2, BLOCK)) <= error.unflatten(2, (-1, BLOCK)).flatten(3).norm(dim=-1)).all())


@pytest.mark.parametrize("rank", [1, 4])
def test_it_is_nearly_the_best_of_its_rank(rank: int) -> None:
    """A Gaussian's flat spectrum is the hardest; the more rounds, the nearer."""
    best = spectrum(X)[..., rank:].square().sum(-1).sqrt()
    left = reduced(X, ErrorBasis(rank, BLOCK))
    assert bool((left < 1.05 * best).all())
    assert bool((reduced(X, ErrorBasis(rank, BLOCK, loops=30)) < 1.01 * best).all())


@pytest.mark.parametrize(("rank", "held"), [(1, 1), (4, 4), (2, 4), (40, 40)])
def test_an_error_of_that_rank_is_taken_away(rank: int, held: int) -> None:
    """To fp16, for example one channel shifted by a pattern."""
    error = normal(2, 3, 2 * BLOCK, rank) @ normal(2, 3, rank, WIDTH, seed=3) / rank
    error = error.unflatten(2, (-1, BLOCK)).contiguous().flatten(2, 3)
    basis = ErrorBasis(held, BLOCK)
    close(basis.add(torch.zeros_like(error), basis.of(error)), error, torch.float16)
    shifted = torch.zeros_like(X)
    shifted[..., 5] = X[..., 5]
    close(basis.add(torch.zeros_like(X), basis.of(shifted)), shifted, torch.float16)


def test_higher_ranks_are_closer() -> None:
    errors = [frobenius(Encoding(Affine(2, 32, "token"), error=ErrorBasis(rank, BLOCK))) for rank in (1, 2, 4, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < frobenius(Encoding(Affine(2, 32, "token")))
    assert errors[-1] < errors[0] / 100


def test_blocks_are_written_once_and_alike() -> None:
    basis = ErrorBasis(3, BLOCK)
    whole = basis.of(X)
    for name, tensor in whole.items():
        parts = [basis.of(half)[name] for half in X.split(BLOCK, 2)]
        same(torch.cat(parts, 2), tensor)


def test_bytes_of_the_basis() -> None:
    parts = ErrorBasis(4, BLOCK).of(X)
    assert sum(t.nbytes for t in parts.values()) == 2 * 3 * 2 * 4 * (BLOCK + WIDTH) * 2


def ranged(count: int) -> tuple[Outliers, torch.Tensor, torch.Tensor]:
    """Ranges of channels that differ a thousandfold, and numbers within them."""
    scale, zero = 10.0 ** torch.linspace(-2, 1, WIDTH).expand(3, -1), normal(3, WIDTH, seed=4)
    x = zero[:, None] + scale[:, None] * X.clamp(-0.9, 0.9)
    return Outliers(count, "channel", scale=scale, zero=zero), x, scale


def test_known_ranges_decide_what_is_far() -> None:
    """A small channel's number far outside its range goes before a large channel's number within its own."""
    outliers, x, scale = ranged(2)
    x = x.clone()
    x[..., 3] += 5 * scale[:, None, 3]
    x[..., 50] -= 4 * scale[:, None, 50]
    bare, parts = outliers.split(x)
    same(parts["outliers.index"].sort(-1).values, torch.tensor([3, 50], dtype=torch.int16).expand(2, 3, 2 * BLOCK, 2))
    assert outliers.zero is not None
    same(bare[..., 3], outliers.zero[None, :, None, 3].expand_as(bare[..., 3]))
    same(outliers.join(bare, parts)[..., 50], x[..., 50].half().float())
    _, plain = Outliers(2, "channel").split(x)
    assert not bool((plain["outliers.index"] == 3).any())  # by its size alone nobody would look at it


def test_known_ranges_of_some_heads() -> None:
    outliers, x, _ = ranged(2)
    for name, part in outliers.heads([2, 0]).split(x[:, [2, 0]])[1].items():
        same(part, outliers.split(x)[1][name][:, [2, 0]])


@pytest.mark.parametrize("heads", [2, 3])
def test_known_ranges_must_fit(heads: int) -> None:
    outliers, _, _ = ranged(1)
    outliers.check(3, WIDTH)
    with pytest.raises(InputError, match="another shape"):
        outliers.check(heads, WIDTH if heads == 2 else WIDTH // 2)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Outliers(0, "token"),
        lambda: Outliers(1, "token", 8, torch.ones(1, 8), torch.zeros(1, 8)),
        lambda: Outliers(1, "channel", scale=torch.ones(1, 8)),
        lambda: ErrorBasis(0, 8),
        lambda: ErrorBasis(1, 0),
    ],
)
def test_refusals(made: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="bad"):
        made()
