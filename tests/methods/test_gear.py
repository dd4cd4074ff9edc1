"""GEAR, card B4: a quantiser, outliers apart, and the error's strongest directions; ranks dealt by their worth."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.encoding.encoding import Encoding
from kvtool.errors import InputError
from kvtool.methods.gear import Options, dealt, sides, with_rank
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Store
from tests import models
from tests.tolerance import close

BLOCK, WIDTH = 64, 32
BRIEF = dict(samples=1, tokens=40, block=8, group=8)


def made(model: Model, **settings: object) -> Plan:
    return calibrate("gear", BRIEF | settings, model=models.with_tokenizer(model))


def stored(plan: Plan) -> Store:
    assert plan.store is not None
    return plan.store


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(side: Encoding, x: torch.Tensor) -> float:
    return float((side.decode(side.encode(x), x.shape[-1]) - x).norm())


X = draw(2, 3, 2 * BLOCK, WIDTH)
SIDES = pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])


def whole(options: Options) -> tuple[Encoding, Encoding]:
    first, second = (with_rank(side, options.rank, options.block) for side in sides(options, WIDTH))
    return first, second


@SIDES
def test_each_part_takes_error_away(side: int) -> None:
    settings: list[dict] = [dict(rank=0, outliers=0), dict(rank=2, outliers=0), dict(rank=2), dict(rank=4)]
    errors = [error(whole(Options(bits=2, **chosen))[side], X) for chosen in settings]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


@SIDES
def test_an_error_of_that_rank_is_exact(side: int) -> None:
    """Rank that spans the block leaves what fp16 leaves."""
    options = Options(bits=2, rank=WIDTH)
    back = whole(options)[side]
    close(back.decode(back.encode(X), WIDTH), X, torch.float16)


@SIDES
def test_a_share_of_one_is_exact(side: int) -> None:
    back = whole(Options(bits=1, outliers=1.0, rank=0))[side]
    close(back.decode(back.encode(X), WIDTH), X.half().float())


def test_planted_outliers_cost_nothing() -> None:
    """One number of each key channel and block, and one of each value token, a hundred times too large."""
    for side, step in enumerate((BLOCK, 1)):
        x = X.clone()
        if side == 0:
            x[:, :, 5::step] *= 100
        else:
            x[..., 7] *= 100
        kept, bare = (whole(Options(bits=4, rank=0, outliers=share))[side] for share in (0.02, 0.0))
        assert error(kept, x) < 1.2 * error(kept, X)
        assert error(bare, x) > 5 * error(kept, x)


def test_bytes_are_the_formula() -> None:
    """b + 32/group, outliers of 32 bits, and 16ρ(1/block + 1/D), a number."""
    options = Options(bits=2, rank=2, group=32, outliers=0.02)
    for side, per in zip(whole(options), (BLOCK, WIDTH), strict=True):
        held = sum(part.nbytes for part in side.encode(X).values())
        bits = 2 + 32 / 32 + 32 / per + 16 * 2 * (1 / BLOCK + 1 / WIDTH)
        assert 8 * held == bits * X.numel()


def test_outliers_are_counted_per_vector() -> None:
    """Of a channel's tokens for keys, of a token's channels for values; never none while a share is asked for."""
    for share, width, expected in ((0.02, 64, (1, 1)), (0.05, 64, (3, 3)), (0.001, 32, (1, 1)), (0.1, 32, (6, 3))):
        counts = [side.outliers.count for side in sides(Options(outliers=share), width) if side.outliers is not None]
        assert tuple(counts) == expected


@pytest.mark.parametrize(("base", "groups"), [("kivi", (16, 16)), ("kcvt", (64, 32))])
def test_bases(base: str, groups: tuple[int, int]) -> None:
    options = Options(base=base, group=16)  # type: ignore[arg-type]
    assert tuple(side.codec.group for side in sides(options, WIDTH)) == groups  # type: ignore[attr-defined]


def test_ranks_are_dealt_to_what_they_help_most() -> None:
    """A planted spectrum: one side's error has a single strong direction, another's is flat and loud, one is silent."""
    energy = torch.zeros(2, 2, 6)
    energy[0, 0, 0] = 9.0
    energy[0, 1] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    energy[1, 0] = torch.tensor([2.5, 0.1, 0.0, 0.0, 0.0, 0.0])
    assert dealt(energy, 1).tolist() == [[1, 3], [0, 0]]
    assert dealt(energy, 2).tolist() == [[1, 6], [1, 0]]
    assert int(dealt(energy, 99).sum()) == energy.numel()


def test_calibrated_ranks_cost_the_same(llama: Model) -> None:
    fixed, dealt_ = made(llama, rank=2), made(llama, rank=2, mode="calibrated")
    assert int(fixed.evidence["ranks"].sum()) == int(dealt_.evidence["ranks"].sum()) == 2 * 2 * llama.geometry.layers
    store = stored(dealt_)
    for layer, pair in enumerate(dealt_.evidence["ranks"].tolist()):
        number = int(store.index[layer, 0])
        for side, rank in zip((store.keys[number], store.values[number]), pair, strict=True):
            assert (0 if side.error is None else side.error.rank) == rank


def test_refusals(llama: Model) -> None:
    with pytest.raises(InputError, match="rank"):
        Options(rank=-1)
    with pytest.raises(InputError, match="a block of 64"):
        Options(tokens=20)
