"""Transforms: there and back, attention in the other basis, subsets of heads, and what commutes with RoPE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvtool.encoding.encoding import Encoding
from kvtool.encoding.transforms import Gather, Hadamard, Join, Linear, Scale, Transform
from kvtool.errors import InputError
from tests.tolerance import close, same

HEADS, WIDTH, ENTRIES, ROWS = 4, 16, 63, 6
DRAW = torch.Generator()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=DRAW.manual_seed(seed))


def rotation(heads: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(heads, width, width, seed=seed))[0].contiguous()


def permutations(heads: int, keep: int = WIDTH) -> torch.Tensor:
    return torch.stack([torch.randperm(WIDTH, generator=DRAW.manual_seed(head))[:keep] for head in range(heads)])


def basis(heads: int, rank: int, width: int = WIDTH, *, mean: bool = False) -> Linear:
    down = rotation(heads, width)[..., :rank].contiguous()
    return Linear(down, down.transpose(1, 2).contiguous(), normal(heads, width, seed=1) if mean else None)


def turn(x: torch.Tensor) -> torch.Tensor:
    """x [..., S, D] rotated as by RoPE in the half-split layout, entry by entry."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


HALF = 0.5 + normal(HEADS, WIDTH // 2).abs()
INVERTIBLE: dict[str, tuple[Transform, ...]] = {
    "scale": (Scale(0.5 + normal(HEADS, WIDTH).abs()),),
    "scale-in-pairs": (Scale(torch.cat([HALF, HALF], 1)),),
    "one-scale-for-all": (Scale(0.5 + normal(1, WIDTH).abs()),),
    "permutation": (Gather(permutations(HEADS), WIDTH),),
    "one-permutation": (Gather(permutations(1), WIDTH),),
    "hadamard": (Hadamard(),),
    "rotation": (basis(HEADS, WIDTH),),
    "rotation-and-mean": (basis(HEADS, WIDTH, mean=True),),
    "one-basis": (basis(1, WIDTH, mean=True),),
    "join": (Join(2),),
    "join-all": (Join(4),),
    "join-then-rotate": (Join(2), basis(2, 2 * WIDTH, 2 * WIDTH, mean=True)),
    "mean-then-join": (basis(HEADS, WIDTH, mean=True), Join(2)),
    "mean-join-mean": (basis(HEADS, WIDTH, mean=True), Join(2), basis(2, 2 * WIDTH, 2 * WIDTH, mean=True)),
    "join-twice": (Join(2), basis(1, 2 * WIDTH, 2 * WIDTH, mean=True), Join(2), Hadamard()),
    "scale-permute-hadamard": (Scale(0.5 + normal(HEADS, WIDTH).abs()), Gather(permutations(HEADS), WIDTH), Hadamard()),
}
LOSSY: dict[str, tuple[Transform, ...]] = {
    "channels": (Gather(permutations(HEADS, 5), WIDTH),),
    "low-rank": (basis(HEADS, 5, mean=True),),
    "low-rank-across-heads": (Join(2), basis(2, 7, 2 * WIDTH, mean=True)),
    "oblique": (Linear(normal(HEADS, WIDTH, 6), normal(HEADS, 6, WIDTH, seed=3), normal(HEADS, WIDTH, seed=4)),),
}
ALL = {**INVERTIBLE, **LOSSY}
EXACT = ("permutation", "one-permutation", "join", "join-all")
X = normal(2, HEADS, ENTRIES, WIDTH, seed=7)


def forward(steps: tuple[Transform, ...], x: torch.Tensor) -> torch.Tensor:
    for step in steps:
        x = step.forward(x)
    return x


def inverse(steps: tuple[Transform, ...], z: torch.Tensor) -> torch.Tensor:
    for step in reversed(steps):
        z = step.inverse(z)
    return z


@pytest.mark.parametrize("name", INVERTIBLE)
def test_there_and_back(name: str) -> None:
    back = inverse(INVERTIBLE[name], forward(INVERTIBLE[name], X))
    (same if name in EXACT else close)(back, X)


@pytest.mark.parametrize("name", ALL)
def test_widths_and_heads_are_as_announced(name: str) -> None:
    width, joined = WIDTH, 1
    for step in ALL[name]:
        width, joined = step.width(width), joined * step.joined()
    assert forward(ALL[name], X).shape == (2, HEADS // joined, ENTRIES, width)


@pytest.mark.parametrize("name", ALL)
def test_queries_meet_what_is_written(name: str) -> None:
    """q·x̂ = query(q)·ẑ + offset, for any ẑ."""
    encoding = Encoding(transforms=ALL[name])
    z = normal(*forward(ALL[name], X).shape, seed=8)
    q = normal(2, HEADS, ROWS, WIDTH, seed=9)
    turned, offset = encoding.query(q)
    logits = turned @ z.transpose(-1, -2)
    if offset is not None:
        logits = logits + offset[..., None]
    expected = q @ inverse(ALL[name], z).transpose(-1, -2)
    close(logits.reshape(expected.shape) / WIDTH, expected / WIDTH)


@pytest.mark.parametrize("name", ALL)
def test_means_of_what_is_written(name: str) -> None:
    """Σ p·x̂ = output(Σ p·ẑ), where Σ p = 1."""
    encoding = Encoding(transforms=ALL[name])
    z = normal(*forward(ALL[name], X).shape, seed=8)
    weights = normal(2, HEADS, ROWS, ENTRIES, seed=10).softmax(-1)
    mixed = weights.reshape(2, z.shape[1], -1, ENTRIES) @ z
    close(encoding.output(mixed, ROWS), weights @ inverse(ALL[name], z))


@pytest.mark.parametrize("indices", [[2], [0, 3], [3, 1]], ids=str)
@pytest.mark.parametrize("name", [name for name in ALL if not any(isinstance(step, Join) for step in ALL[name])])
def test_some_heads(name: str, indices: list[int]) -> None:
    steps = tuple(step.heads(indices) for step in ALL[name])
    z = forward(ALL[name], X)
    close(forward(steps, X[:, indices]), z[:, indices])
    close(inverse(steps, z[:, indices]), inverse(ALL[name], z)[:, indices])


def distance(steps: tuple[Transform, ...]) -> float:
    """How far apart "first RoPE, then the steps" and "first the steps, then RoPE" are, head by head."""

    def apart(x: torch.Tensor) -> torch.Tensor:
        z = forward(steps, x)
        return z.unflatten(3, (-1, WIDTH)).transpose(2, 3).flatten(1, 2)

    return float((apart(turn(X)) - turn(apart(X))).abs().max())


@pytest.mark.parametrize("name", [name for name in INVERTIBLE if len(INVERTIBLE[name]) == 1])
def test_what_commutes_with_rope(name: str) -> None:
    commutes = INVERTIBLE[name][0].commutes
    assert distance(INVERTIBLE[name]) < 1e-5 if commutes else distance(INVERTIBLE[name]) > 0.1
    assert commutes == (name in ("scale-in-pairs", "join", "join-all"))


def test_pairs_are_only_known_within_a_head() -> None:
    """A scale that is equal on both halves of two joined heads need not be equal on the halves of each."""
    halves = torch.cat([HALF[:1], 2 * HALF[:1]], 1)
    steps = (Join(2), Scale(torch.cat([halves, halves], 1)))
    assert all(step.commutes for step in steps)
    assert distance(steps) > 0.1
    assert not Encoding(transforms=steps).commutes
    assert Encoding(transforms=INVERTIBLE["scale-in-pairs"]).commutes


@pytest.mark.parametrize("width", [1, 2, 64, 128])
def test_hadamard_of_powers_of_two(width: int) -> None:
    x = normal(1, 1, 3, width)
    z = Hadamard().forward(x)
    close(z.norm(dim=-1), x.norm(dim=-1))
    close(Hadamard().forward(z), x)
    assert Hadamard().width(width) == width


@pytest.mark.parametrize("width", [3, 24, 96, 192])
def test_hadamard_refuses_other_widths(width: int) -> None:
    with pytest.raises(InputError, match="power of two"):
        Hadamard().width(width)
    with pytest.raises(ValueError, match="powers of two"):
        Hadamard().forward(normal(1, 1, 3, width))


@pytest.mark.parametrize("name", ["scale", "permutation", "channels", "low-rank"])
def test_steps_for_another_width_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="another width"):
        ALL[name][0].width(2 * WIDTH)


def dropped(rank: int, *, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared error of the best basis of `rank`, and the energy of the singular values that it leaves out."""
    centre = X.mean((0, 2)) if mean else None
    rows = X.transpose(0, 1).flatten(1, 2) - (0 if centre is None else centre[:, None])
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    up = right[:, :rank].contiguous()
    step = Linear(up.transpose(1, 2).contiguous(), up, centre)
    error = (step.inverse(step.forward(X)) - X).square().sum((0, 2, 3))
    return error, values[:, rank:].square().sum(-1)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 15, 16])
def test_low_rank_loses_the_energy_left_out(rank: int, mean: bool) -> None:
    error, energy = dropped(rank, mean=mean)
    close(error / 100, energy / 100)


def test_higher_ranks_lose_less() -> None:
    errors = [float(dropped(rank, mean=True)[0].sum()) for rank in range(1, WIDTH + 1)]
    assert errors == sorted(errors, reverse=True)


def test_channels_that_are_gone_come_back_as_zero() -> None:
    kept = torch.tensor([[1, 4, 14]])
    back = inverse(steps := (Gather(kept, WIDTH),), forward(steps, X))
    same(back[..., kept[0]], X[..., kept[0]])
    assert int((back != 0).any(0).any(0).any(0).sum()) == 3


@pytest.mark.parametrize("made", [normal, torch.zeros], ids=["normal", "zero"])
@pytest.mark.parametrize("entries", [0, 1])
def test_no_entry_and_one(entries: int, made: Callable[..., torch.Tensor]) -> None:
    x = made(1, HEADS, entries, WIDTH)
    for steps in INVERTIBLE.values():
        close(inverse(steps, forward(steps, x)), x)
